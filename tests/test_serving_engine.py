"""The engine: whatever comes and goes beside it, a sequence is written and judged as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import make_guardrail, make_model, make_sae
from saeguard.clamp import Clamp
from saeguard.errors import OverloadedError, UnavailableError
from saeguard.gate import Gate, Density
from saeguard.guardrail import Guardrail
from saeguard.serving.engine import Engine, Limits
from saeguard.serving.job import Event, Failed, Finished, Job, Started, Written
from saeguard.serving.readings import Reading, attached
from saeguard.serving.sampling import Sampling
from tiny import NEW, generate, mixed_guardrail, prompts, same_verdicts, with_rule

LENGTHS = (5, 9, 13, 7, 30, 11, 21)


class Told:
    """What a job was told, in order; `wait` returns at its end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._end = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self._end.set()

    def wait(self) -> Event:
        assert self._end.wait(60), self.events
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return [event.token.id for event in self.events if isinstance(event, Written)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Written | Finished))

    @property
    def readings(self) -> tuple[Reading, ...]:
        last = self.wait()
        assert isinstance(last, Finished), last
        return last.readings


@contextmanager
def engine(model: Any, tokenizer: Any, *guardrails: Guardrail, limits: Limits | None = None) -> Iterator[Engine]:
    """A running engine; its guardrails are called g0, g1, ..."""
    named = [(f"g{i}", guardrail) for i, guardrail in enumerate(guardrails)]
    with attached(named, model, tokenizer) as guards:
        running = Engine(model, tokenizer, guards, limits or Limits())
        running.start()
        try:
            yield running
        finally:
            running.stop(grace=30)


def greedy(row: Tensor, told: Told, **changes: Any) -> Job:
    return Job(row[0].tolist(), Sampling(max_tokens=NEW), told, **changes)


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return prompts(*LENGTHS)


@pytest.fixture(scope="module")
def endless(llama) -> Any:
    """The tiny Llama, whose answers do not end before their time."""
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def mixed(llama, tokenizer, rows) -> Guardrail:
    """Triggers on some prompts, on some answers, on some never."""
    return mixed_guardrail(llama, tokenizer, make_sae("jumprelu"), rows)


@pytest.fixture(scope="module")
def alone(llama, tokenizer, mixed, rows) -> list[tuple[list[int], Any]]:
    """Greedy tokens and verdict of each row, one by one."""
    found = []
    with mixed.attach(llama, tokenizer) as guard:
        for row in rows:
            whole = generate(llama, row)
            found.append((whole[0, row.shape[1] :].tolist(), guard.judge(whole[:, :-1])[0]))
    return found


def no_eos(tokenizer: Any) -> Any:
    return tokenizer


@settings(max_examples=12)
@given(data=st.data())
def test_rows_that_come_and_go_change_nothing(data, llama, tokenizer, mixed, rows, alone):
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=12))
    limits = Limits(rows=data.draw(st.integers(1, 6)), prompt_tokens=data.draw(st.sampled_from([1, 40, 2048])))
    with engine(llama, tokenizer, mixed, limits=limits) as running:
        told = []
        for place in order:
            told.append((place, Told()))
            job = greedy(rows[place], told[-1][1])
            running.submit([job])
            if data.draw(st.booleans()):
                time.sleep(data.draw(st.sampled_from([0.001, 0.01])))
            if data.draw(st.integers(0, 4)) == 0:
                running.cancel(job)
                told.pop()
        for place, one in told:
            tokens, verdict = alone[place]
            last = one.wait()
            assert isinstance(last, Finished)
            same_verdicts([replace(last.readings[0].verdict)], [replace(verdict, rule="topic")])
            assert one.tokens == tokens[: len(one.tokens)]

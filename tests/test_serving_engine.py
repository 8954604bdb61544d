"""The engine: whatever comes and goes beside it, a sequence is written and judged as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from conftest import make_guardrail, make_model, make_sae
from saeguard.errors import OverloadedError, UnavailableError
from saeguard.guardrail import Guardrail, merge
from saeguard.online.verdicts import Verdict
from saeguard.serving.engine import Engine, Limits
from saeguard.serving.job import Event, Failed, Finished, Job, Started, Written
from saeguard.serving.readings import attached
from saeguard.serving.sampling import Sampling
from tiny import NEW, generate, hooks_on, mixed_guardrail, prompts, same_verdicts, with_rule

LENGTHS = (5, 9, 13, 7, 30, 11, 21)
EOS = 2


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

    def finished(self) -> Finished:
        last = self.wait()
        assert isinstance(last, Finished), last
        return last

    @property
    def tokens(self) -> list[int]:
        return [event.token.id for event in self.events if isinstance(event, Written)]

    @property
    def ended(self) -> bool:
        return self._end.is_set()


@contextmanager
def engine(
    model: Any, tokenizer: Any, *guardrails: Guardrail, limits: Limits | None = None, **options: Any
) -> Iterator[Engine]:
    """A running engine; its guardrails are called g0, g1, ..."""
    named, hooks = [(f"g{i}", guardrail) for i, guardrail in enumerate(guardrails)], hooks_on(model)
    with attached(named, model, tokenizer) as guards:
        running = Engine(model, tokenizer, guards, limits or Limits(), **options)
        running.start()
        try:
            yield running
        finally:
            running.stop(grace=30)
    assert hooks_on(model) == hooks


def greedy(row: Tensor, told: Told, *, tokens: int = NEW, **changes: Any) -> Job:
    return Job(row[0].tolist(), Sampling(max_tokens=tokens), told, **changes)


def write(running: Engine, rows: Sequence[Tensor], **changes: Any) -> list[Told]:
    """Submit all rows at once and wait."""
    told = [Told() for _ in rows]
    running.submit([greedy(row, one, **changes) for row, one in zip(rows, told, strict=True)])
    for one in told:
        one.finished()
    return told


Alone = tuple[list[int], list[Verdict]]
"""Tokens and the verdict of every rule."""


def alone(model: Any, tokenizer: Any, guardrails: Sequence[Guardrail], row: Tensor, tokens: int = NEW) -> Alone:
    """Greedy tokens, and the verdicts on all but the last, by `generate` and `judge` on one row. Not while an engine
    is at work on the model."""
    with ExitStack() as stack:
        guards = [stack.enter_context(guardrail.attach(model, tokenizer)) for guardrail in guardrails]
        whole = generate(model, row, max_new_tokens=tokens, min_new_tokens=0)
        verdicts = []
        for guard in guards:
            guard.judge(whole[:, :-1])
            verdicts += guard.all_verdicts[0]
    return [token for token in whole[0, row.shape[1] :].tolist() if token != EOS], verdicts


def same(told: Told, expected: Alone) -> None:
    """Fail unless a job has come to the tokens and verdicts of its row alone."""
    readings = told.finished().readings
    tokens, verdicts = expected
    assert told.tokens == tokens
    same_verdicts([reading.verdict for reading in readings], verdicts)


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return prompts(*LENGTHS)


@pytest.fixture(scope="module")
def mixed(llama, tokenizer, rows) -> Guardrail:
    """Triggers on some prompts, on some answers, on some never."""
    return mixed_guardrail(llama, tokenizer, make_sae("jumprelu"), rows)


@pytest.fixture(scope="module")
def expected(llama, tokenizer, mixed, rows) -> list[Alone]:
    return [alone(llama, tokenizer, [mixed], row) for row in rows]


@settings(max_examples=25)
@given(data=st.data())
def test_rows_that_come_and_go_change_nothing(data, llama, tokenizer, mixed, rows, expected):
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=14))
    limits = Limits(rows=data.draw(st.integers(1, 6)), prompt_tokens=data.draw(st.sampled_from([1, 40, 2048])))
    kept: list[tuple[int, Told]] = []
    with engine(llama, tokenizer, mixed, limits=limits) as running:
        for place in order:
            told = Told()
            job = greedy(rows[place], told)
            running.submit([job])
            time.sleep(data.draw(st.sampled_from([0.0, 0.001, 0.01])))
            if data.draw(st.integers(0, 4)) == 0:
                running.cancel(job)
            else:
                kept.append((place, told))
        for place, told in kept:
            same(told, expected[place])


def test_the_rows_trigger_at_all_times(expected, rows):
    firsts = [verdicts[0].first_token for _, verdicts in expected]
    when = {
        "never" if f is None else "prompt" if f < row.shape[1] else "answer"
        for f, row in zip(firsts, rows, strict=True)
    }
    assert when == {"never", "prompt", "answer"}


def test_every_family(model, tokenizer, rows):
    guardrail = make_guardrail(model, tokenizer, make_sae("topk"), 2, threshold=0.2)
    with engine(model, tokenizer, guardrail, limits=Limits(rows=4)) as running:
        told = write(running, rows)
    for one, row in zip(told, rows, strict=True):
        same(one, alone(model, tokenizer, [guardrail], row))


def test_windows_that_slide_past_the_start(tokenizer, rows):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.3, query_pre_attn_scalar=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    gemma = Gemma2ForCausalLM(config).eval()
    guardrail = make_guardrail(gemma, tokenizer, make_sae("relu"), 2, threshold=0.3)
    with engine(gemma, tokenizer, guardrail) as running:
        told = write(running, rows)
    for one, row in zip(told, rows, strict=True):
        same(one, alone(gemma, tokenizer, [guardrail], row))


def test_several_guardrails_on_one_layer_and_on_two(llama, tokenizer, mixed, rows):
    other = make_guardrail(llama, tokenizer, make_sae("relu"), 1, features=(1, 2, 3), threshold=0.3)
    later = make_guardrail(llama, tokenizer, make_sae("topk"), 3, threshold=0.2)
    with engine(llama, tokenizer, mixed, other, later) as running:
        told = write(running, rows)
    for one, row in zip(told, rows, strict=True):
        same(one, alone(llama, tokenizer, [merge([mixed, with_rule(other, name="other")]), later], row))
        assert [reading.id for reading in one.finished().readings] == ["g0", "g1", "g2"]
        assert {reading.verdict.rule for reading in one.finished().readings} == {"topic"}


def test_rows_of_one_batch_may_have_different_guardrails(llama, tokenizer, mixed, rows):
    always = make_guardrail(llama, tokenizer, make_sae("relu"), 1, threshold=0.1)
    later = make_guardrail(llama, tokenizer, make_sae("topk"), 3, threshold=0.1)
    all_ = [mixed, always, later]
    subsets = [(), (0,), (1,), (2,), (0, 2), (1, 2), (2,)]
    told = [Told() for _ in rows]
    with engine(llama, tokenizer, *all_) as running:
        running.submit([
            greedy(row, one, guardrails=frozenset(f"g{i}" for i in subset))
            for row, one, subset in zip(rows, told, subsets, strict=True)
        ])  # fmt: skip
        for one in told:
            one.finished()
    for one, row, subset in zip(told, rows, subsets, strict=True):
        same(one, alone(llama, tokenizer, [all_[i] for i in subset], row))


def test_monitor_leaves_the_text_and_counts(llama, tokenizer, mixed, rows, expected):
    with engine(llama, tokenizer, with_rule(mixed, action="monitor")) as running:
        told = write(running, rows)
    for one, row in zip(told, rows, strict=True):
        plain = alone(llama, tokenizer, [], row)
        assert one.tokens == plain[0]
        assert one.finished().readings[0].clamped == 0
    assert any(one.finished().readings[0].verdict.triggered for one in told)


def test_what_was_read_is_counted(llama, tokenizer, rows):
    guardrail = make_guardrail(llama, tokenizer, make_sae("relu"), 2, threshold=-1.0)
    with engine(llama, tokenizer, guardrail) as running:
        told = write(running, rows)
    for one, row in zip(told, rows, strict=True):
        reading = one.finished().readings[0]
        assert reading.tokens == row.shape[1] + one.finished().tokens - 1
        assert reading.hot == reading.clamped
        assert bool(reading.hot) == bool(reading.verdict.features)
    assert any(one.finished().readings[0].hot for one in told)


def test_refuse_ends_where_it_triggers(llama, tokenizer, mixed, rows):
    refusing = with_rule(mixed, action="refuse")
    with engine(llama, tokenizer, refusing) as running:
        told = write(running, rows)
    reasons = set()
    for one, row in zip(told, rows, strict=True):
        plain = alone(llama, tokenizer, [], row)[0]
        reading, first = one.finished().readings[0], one.finished().readings[0].verdict.first_token
        assert (first is not None) == (one.finished().reason == "refused")
        if first is not None:
            assert reading.tokens > first
            assert one.tokens == plain[: max(0, first + 1 - row.shape[1])]
        else:
            assert one.tokens == plain
        reasons.add((one.finished().reason, bool(one.tokens)))
    assert reasons >= {("refused", False), ("refused", True)}


def test_seeds_give_the_same_alone_and_among_others(llama, tokenizer, mixed, rows):
    def job(row: Tensor, told: Told, seed: int) -> Job:
        sampling = Sampling(NEW, temperature=0.9, top_p=0.95, frequency_penalty=0.3, seed=seed)
        return Job(row[0].tolist(), sampling, told)

    together, one_by_one = [Told() for _ in rows], [Told() for _ in rows]
    with engine(llama, tokenizer, mixed) as running:
        running.submit([job(row, told, i) for i, (row, told) in enumerate(zip(rows, together, strict=True))])
        for i, (row, told) in enumerate(zip(rows, one_by_one, strict=True)):
            together[i].wait()
            running.submit([job(row, told, i)])
            told.wait()
    assert [told.tokens for told in together] == [told.tokens for told in one_by_one]
    assert len({tuple(told.tokens) for told in together}) > 1


def test_answers_end_at_stop_strings_and_at_eos(llama, tokenizer, rows):
    tokens, _ = alone(llama, tokenizer, [], rows[0])
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    stop = text[2:4]
    told, ended = Told(), Told()
    with engine(llama, tokenizer) as running:
        running.submit([Job(rows[0][0].tolist(), Sampling(NEW, stop=(stop,)), told)])
        assert told.finished().reason == "stop"
        shown = "".join(event.text for event in told.events if isinstance(event, Written | Finished))
        assert shown == text[: text.index(stop)]
    with engine(llama, tokenizer, ends=frozenset([tokens[3]])) as running:
        running.submit([greedy(rows[0], ended)])
        assert ended.finished().reason == "stop"
    assert ended.tokens == tokens[: tokens.index(tokens[3])]


def test_the_prompt_is_told_before_the_first_token(llama, tokenizer, mixed, rows, expected):
    with engine(llama, tokenizer, mixed) as running:
        told = write(running, rows)
    with mixed.attach(llama, tokenizer) as guard:
        for one, row in zip(told, rows, strict=True):
            assert isinstance(one.events[0], Started)
            same_verdicts([one.events[0].readings[0].verdict], guard.judge(row))


def test_a_cancelled_job_is_told_nothing_more(llama, tokenizer, rows):
    cancelled, other = Told(), Told()
    with engine(llama, tokenizer) as running:
        job = greedy(rows[0], cancelled, tokens=900)
        running.submit([job, greedy(rows[1], other, tokens=60)])
        while not cancelled.tokens:
            time.sleep(0.001)
        running.cancel(job)
        other.finished()
        heard = len(cancelled.events)
        while running.running:
            time.sleep(0.001)
        assert len(cancelled.events) == heard < 900
        assert not cancelled.ended
        running.cancel(job)
        assert write(running, rows[:1])


def test_time_is_up_while_written_and_while_waiting(llama, tokenizer, rows):
    written, waiting = Told(), Told()
    with engine(llama, tokenizer, limits=Limits(rows=1)) as running:
        soon = time.monotonic() + 0.2
        running.submit([greedy(rows[0], written, tokens=900, deadline=soon), greedy(rows[1], waiting, deadline=soon)])
        for told in (written, waiting):
            last = told.wait()
            assert isinstance(last, Failed)
            assert last.late
        assert written.tokens
        assert not waiting.tokens
        assert write(running, rows[:1])


def test_no_room_to_wait(llama, tokenizer, rows):
    with engine(llama, tokenizer, limits=Limits(rows=1, waiting=2)) as running:
        with pytest.raises(OverloadedError):
            running.submit([greedy(rows[0], Told()) for _ in range(3)])
        assert running.waiting == 0
        assert write(running, rows[:2])


def test_the_end_lets_running_jobs_finish_within_the_grace(llama, tokenizer, rows):
    finishing, cut_off = Told(), Told()
    with engine(llama, tokenizer) as running:
        running.submit([greedy(rows[0], finishing)])
        running.drain()
        assert not running.ready
        with pytest.raises(UnavailableError, match="shutting down"):
            running.submit([greedy(rows[0], Told())])
        finishing.finished()
    with engine(llama, tokenizer) as running:
        running.submit([greedy(rows[0], cut_off, tokens=10_000)])
        running.stop(grace=0.05)
        assert isinstance(cut_off.wait(), Failed)


def test_a_prompt_that_makes_no_numbers_fails_alone(tokenizer, rows):
    model = make_model("llama")
    poison = 100
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    guardrail = make_guardrail(model, tokenizer, make_sae("relu"), 2)
    good = rows[1].clone()
    good[good == poison] = 99
    bad = torch.cat([rows[0], torch.tensor([[poison]])], dim=1)
    failing, fine = Told(), Told()
    with engine(model, tokenizer, guardrail, limits=Limits(prompt_tokens=1)) as running:
        running.submit([greedy(good, fine), greedy(bad, failing)])
        assert isinstance(failing.wait(), Failed)
        assert fine.finished()
        assert running.ready


def test_a_fault_ends_every_job_and_the_engine(tokenizer, rows):
    model = make_model("llama")
    model.lm_head = nn.Linear(7, 3)
    reading, waiting = Told(), Told()
    with engine(model, tokenizer, limits=Limits(rows=1)) as running:
        running.submit([greedy(rows[0], reading), greedy(rows[1], waiting)])
        assert isinstance(reading.wait(), Failed)
        assert isinstance(waiting.wait(), Failed)
        assert not running.ready
        with pytest.raises(UnavailableError, match="failed"):
            running.submit([greedy(rows[0], Told())])

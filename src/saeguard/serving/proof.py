"""The proof before serving: through the real engine, a text of the topic fires and an ordinary one does not.

A hook on the wrong layer, weights other than those calibrated on, or tokens given to the wrong sequence would let the
server answer while its guard sleeps. One text each of what must and must not happen shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from saeguard.errors import ProofError
from saeguard.serving.engine import Engine
from saeguard.serving.job import Event, Failed, Finished, Job
from saeguard.serving.policy import Served, rules_of
from saeguard.serving.proof_texts import ProofTexts
from saeguard.serving.readings import Reading
from saeguard.serving.sampling import Sampling
from saeguard.windows import bos_ids


def prove(engine: Engine, guardrails: Mapping[str, Served], tokenizer: Any) -> None:
    """Raises `ProofError` unless every rule of every guardrail fires and stays silent where it must."""
    front = bos_ids(tokenizer)

    def read(name: str, place: int, text: str) -> Reading:
        ids = front + list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return _read(engine, ids, name)[place]

    for name, served in guardrails.items():
        for place, rule in enumerate(rules_of(served)):
            texts = ProofTexts.of(rule)
            fires = read(name, place, texts.fires)
            silent = [read(name, place, text) for text in texts.ordinary]
            _check(f"{name}/{rule.name}", fires, silent)


def _read(engine: Engine, ids: Sequence[int], name: str) -> tuple[Reading, ...]:
    """What the guardrail reads in a prompt, by way of the engine. Raises `ProofError`."""
    told: SimpleQueue[Event] = SimpleQueue()
    engine.submit([Job(ids, Sampling(max_tokens=1), told.put, frozenset([name]))])
    while not isinstance(event := told.get(), Finished):
        if isinstance(event, Failed):
            raise ProofError(f"start-up proof of guardrail {name}: {engine.fault or event.message}")
    return event.readings


def _check(name: str, fires: Reading, silent: Sequence[Reading]) -> None:
    if fires.verdict.triggered and (not silent or not all(reading.verdict.triggered for reading in silent)):
        return
    statistics = [round(reading.verdict.statistic, 3) for reading in (fires, *silent)]
    raise ProofError.mismatch(
        f"start-up proof of {name} (threshold {fires.verdict.threshold:.3f}, statistics {statistics})",
        found="every ordinary text fired" if fires.verdict.triggered else "the topic's text did not fire",
        expected="fires on the topic, silent on ordinary text",
        fix="Check that the guardrail was fitted on this model, and that its threshold is as fitted.",
    )

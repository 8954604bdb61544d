"""Guardrails against one topic at several layers, at work together: for `several_saes.py`.

own gates   each is attached inside the one in front of it and decides on what that one leaves; the thresholds are
            raised together until the largest statistic, each in units of its threshold, keeps alpha everywhere
one gate    the first decides for all: what it holds as clamped is clamped at the layers behind it too
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeguard.artifact import fingerprint
from saeguard.calibration import Conformal, Rate, calibrate, rate_above
from saeguard.config import PRESETS
from saeguard.doctor.reading import Subject as Read
from saeguard.embedded import TOPIC, starter_set
from saeguard.evaluation.subject import Loader, Subject
from saeguard.fitting import decide
from saeguard.guardrail import Guardrail
from saeguard.hooks import Change, at
from saeguard.material import gather
from saeguard.model import port_at
from saeguard.online.intervention import Guard
from saeguard.online.live import LiveRule, changes
from saeguard.online.passes import READ_AGAIN
from saeguard.online.verdicts import Verdict, Watch
from saeguard.quickstart import ALPHA, GATE, STRENGTH
from saeguard.sae import SparseAutoencoder
from saeguard.sample import FORGET, read_windows, scored, statistics, trajectories
from saeguard.tokens import TokenMasks, special_token_ids, token_masks

CONFIG = replace(PRESETS["default"], name=TOPIC, alpha=ALPHA, gate=GATE, strength=STRENGTH)


@dataclass(frozen=True)
class Window:
    """A held-out window, and the statistic of a gate on it."""

    corpus: str
    document: int
    split: str
    length: int
    statistic: float


@dataclass(frozen=True)
class Fitted:
    """A guardrail, the processor seconds of its fit, and its gate on the windows that calibrate and test, in one order
    for all layers."""

    guardrail: Guardrail
    seconds: float
    windows: Sequence[Window]
    folder: Path


def fitted(model: Any, tokenizer: Any, sae: SparseAutoencoder, layer: int, work: Path) -> Fitted:
    """The guardrail of quickstart at a layer; from `work` where it is there."""
    folder = work / f"layer-{layer}-{sae.fingerprint()[:8]}"
    path = folder.with_name(f"{folder.name}.json")
    if not path.exists():
        starter, begun = starter_set(), time.process_time()
        its = Read(model, tokenizer, sae, layer)
        with gather(its, starter.forget, starter.retain, CONFIG, work / "shards", show_progress=True) as material:
            guardrail = decide(material, CONFIG)
            seconds = time.process_time() - begun
            read = [w for w in read_windows(material.every_shard, guardrail.rule.encoder) if w.split != "fit"]
            values = statistics(guardrail.gate, trajectories(guardrail.gate, scored(guardrail.gate, read)))
        guardrail.save_pretrained(folder)
        windows = [
            asdict(Window(w.corpus, w.document, w.split, w.length, value))
            for w, value in zip(read, values, strict=True)
        ]
        path.write_text(json.dumps({"seconds": seconds, "windows": windows}), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    guardrail = Guardrail.from_pretrained(folder)
    return Fitted(guardrail, found["seconds"], [Window(**window) for window in found["windows"]], folder)


def largest(parts: Sequence[Fitted], thresholds: Sequence[float]) -> list[Window]:
    """The windows with the largest of the statistics, each in units of its threshold: above 1, one of them triggers.

    Behind a trigger the others read a clamped stream, but then one has triggered already.
    """
    columns = zip(*(part.windows for part in parts), strict=True)
    return [
        replace(its[0], statistic=max(w.statistic / one for w, one in zip(its, thresholds, strict=True)))
        for its in columns
    ]


def jointly(parts: Sequence[Fitted]) -> tuple[Guardrail, ...]:
    """The guardrails with their thresholds raised by one factor, at which together they keep alpha as each did."""
    listed = parts[0].guardrail.evidence["contamination"]["listed"]
    left_out = {(row["corpus"], row["document"]) for row in listed if row["outlier"]}
    kept = [
        window
        for window in largest(parts, [part.guardrail.threshold for part in parts])
        if window.split == "calibration" and window.corpus != FORGET
        if (window.corpus, window.document) not in left_out
    ]
    by_corpus: dict[str, list[float]] = {}
    by_length: dict[int, list[float]] = {}
    for window in kept:
        by_corpus.setdefault(window.corpus, []).append(window.statistic)
        by_length.setdefault(window.length, []).append(window.statistic)
    factor = calibrate(by_corpus, Conformal(ALPHA), by_length=by_length).threshold
    return tuple(with_threshold(part.guardrail, part.guardrail.threshold * factor) for part in parts)


def with_threshold(guardrail: Guardrail, threshold: float) -> Guardrail:
    """The same guardrail with another threshold."""
    return replace(guardrail, rules=(replace(guardrail.rule, threshold=threshold),))


class Either:
    """Several guards at work: a sequence triggers if one of them does."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards

    @property
    def verdicts(self) -> list[Verdict]:
        """Of each sequence, the verdict farthest over its threshold."""
        rows = zip(*(guard.verdicts for guard in self._guards), strict=True)
        return [max(row, key=lambda v: (v.triggered, v.statistic / v.threshold)) for row in rows]

    @property
    def refusals(self) -> list[bool]:
        """None of these refuses."""
        return [False] * len(self.verdicts)


@dataclass(frozen=True)
class Way:
    """Guardrails at work together, the one whose layer runs first in front; `parts` are what they were made of."""

    name: str
    parts: tuple[Fitted, ...]
    guardrails: tuple[Guardrail, ...]
    one_gate: bool = False

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[Watch]:
        """All of them on the model."""
        first, *others = self.guardrails
        with ExitStack() as stack:
            guard = stack.enter_context(first.attach(model, tokenizer))
            if self.one_gate:
                special = torch.tensor(special_token_ids(tokenizer))
                for other in others:
                    stack.enter_context(at(port_at(model, other.point), clamped_with(guard, other, special)))
                yield guard
            else:
                yield Either([guard, *(stack.enter_context(other.attach(model, tokenizer)) for other in others)])

    def subject(self, loader: Loader) -> Subject:
        """To be judged."""
        identity = {"guardrails": [fingerprint(each.rules) for each in self.guardrails], "one gate": self.one_gate}
        return Subject(self.name, loader, self.attach, identity, self.guardrails[0])

    def caught(self) -> tuple[Rate, dict[str, Rate]]:
        """Of the held-out passages, how many of the topic's and of each other corpus's trigger."""
        deciding = slice(1) if self.one_gate else slice(None)
        found = largest(self.parts[deciding], [guardrail.threshold for guardrail in self.guardrails[deciding]])
        tested: dict[str, list[float]] = {}
        for window in found:
            if window.split == "test":
                tested.setdefault(window.corpus, []).append(window.statistic)
        rates = {name: rate_above(values, 1.0) for name, values in tested.items()}
        return rates.pop(FORGET), rates

    @property
    def triggered(self) -> Way:
        """The same, triggered by any text."""
        return replace(self, guardrails=tuple(with_threshold(each, -1.0) for each in self.guardrails))


def clamped_with(guard: Guard, other: Guardrail, special: Tensor) -> Change:
    """At a layer behind a guard's: the clamp of another guardrail at the tokens that the guard holds as clamped."""
    live = LiveRule.of(other.rule, special.device)

    def change(values: Tensor) -> Tensor | None:
        again = READ_AGAIN.get()
        track = guard.last if again is None else again.wanted
        assert track is not None
        masks = token_masks(track.ids, track.attended, special)
        recent = TokenMasks(*(part[:, -values.shape[1] :] for part in vars(masks).values()))
        held = track.rules[0].clamped[:, -values.shape[1] :]
        found = changes([live], [live.encoder(values)], recent, [held])
        if found is None:
            return None
        delta, where = found
        return torch.where(where[..., None], (values + delta).to(values.dtype), values)

    return change

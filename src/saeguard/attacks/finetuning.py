"""Training a copy of a model further on a lesson, stage by stage, and keeping what each stage led to.

    minimised    NLL(window), by the Trainer as the baselines have it; an epoch shows every window once, in a new order

A stage goes on from the last one with weights, optimiser and order of the data, so that stages of 1 and 4 epochs lead
to the digits of one of 5. Every row of a batch is compared with the windows of the lesson before it is learned from.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from saeguard.baselines import memory
from saeguard.baselines.adapting import no_reference, trainable, trained_weights
from saeguard.baselines.checkpoint import compute_dtype
from saeguard.baselines.likelihood import Pair, Reference, nll
from saeguard.baselines.memory import Needs
from saeguard.baselines.texts import Pairs, Texts, pad_id_of
from saeguard.baselines.training import Job, finished, train
from saeguard.baselines.utility import StoppingRule
from saeguard.baselines.weight_settings import Training
from saeguard.baselines.weights import shape_of
from saeguard.errors import EvaluationError
from saeguard.evaluation.subject import Attach, Loader, checkpoint
from saeguard.windows import Window

CHECK_EVERY = 60
"""Steps between checkpoints inside a stage."""
OPTIMISER = "optimizer.pt"


@dataclass(frozen=True)
class Course:
    """Who is trained, on what, how, and where checkpoints are kept. `attach` is a hook that is on meanwhile, and
    `under` its fingerprint."""

    loader: Loader
    windows: Sequence[Window]
    settings: Training
    work: Path
    attach: Attach | None = None
    under: str = ""
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(len(window.ids) for window in self.windows)

    @property
    def memory(self) -> str:
        """What training takes at once, an estimate for people."""
        return memory.gigabytes(self._needs(self.loader.loaded[0]).bytes)

    def steps(self, epochs: int) -> int:
        """Steps of so many epochs."""
        return epochs * -(-len(self.windows) // self.settings.batch)

    def disk(self, stages: int) -> str:
        """What the checkpoints of so many stages take, for people: their weights, and of one the optimiser's state."""
        needs = self._needs(self.loader.loaded[0])
        kept = needs.trained if self.settings.lora_rank else needs.weights
        return memory.gigabytes(4 * kept * stages + 8 * needs.trained)

    @property
    def folder(self) -> Path:
        """Where its stages lie, named by all that they depend on but their number of epochs."""
        settings = {name: value for name, value in vars(self.settings).items() if name not in ("steps", "check_every")}
        parts = [self.loader.identity, [window.ids for window in self.windows], settings, self.under, self.seed]
        return self.work / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def stage(self, epochs: int) -> Path:
        """The folder of what so many epochs lead to."""
        return self.folder / f"epoch-{epochs}"

    def after(self, epochs: int) -> Loader:
        """The model after so many epochs, trained unless that is done. Raises a `GuardrailError` by cause."""
        outcome = finished(self.stage(epochs))
        found = self._train(epochs) if outcome is None else outcome.checkpoint
        model, tokenizer = self.loader.loaded
        dtype = str(model.dtype).removeprefix("torch.")
        return checkpoint(
            str(found), lambda: (copy.deepcopy(model), tokenizer), device=str(model.device), dtype=dtype,
            name=found.relative_to(self.work).as_posix(),
        )  # fmt: skip

    def _train(self, epochs: int) -> Path:
        model, tokenizer = self.loader.loaded
        compute, settings = compute_dtype(model), self.settings
        memory.check(self._needs(model), str(model.device))
        start = self._last_before(epochs)
        rows = _Rows(frozenset(window.ids for window in self.windows))
        with ExitStack() as stack:
            trained = copy.deepcopy(model).float()
            if self.attach is not None:
                stack.enter_context(self.attach(trained, tokenizer))
            torch.manual_seed(self.seed)
            adapted = trainable(trained, None, settings.lora_rank)
            texts = Texts(self.windows, {}, (), {})
            settings = replace(settings, steps=self.steps(epochs), check_every=CHECK_EVERY)
            found = train(Job(
                adapted, tokenizer, pad_id_of(tokenizer), rows, no_reference,
                Pairs(texts, len(self.windows), self.seed), StoppingRule.of(adapted, (), 0.0), settings, compute,
                self.stage(epochs), self.seed, start,
            ), show_progress=True)  # fmt: skip
        if start is not None:  # its weights are kept; an optimiser is three times their size, and the next one is there
            (start / OPTIMISER).unlink(missing_ok=True)
        return found.checkpoint

    def _last_before(self, epochs: int) -> Path | None:
        """The checkpoint of the longest shorter stage that can be gone on from."""
        for earlier in range(epochs - 1, 0, -1):
            outcome = finished(self.stage(earlier))
            if outcome is not None and (outcome.checkpoint / OPTIMISER).is_file():
                return outcome.checkpoint
        return None

    def _needs(self, model: nn.Module) -> Needs:
        settings = self.settings
        longest = max(len(window.ids) for window in self.windows)
        return Needs(
            **shape_of(model), trained=trained_weights(model, None, settings.lora_rank), copies=1,
            tokens=longest * settings.batch // settings.accumulate,
        )  # fmt: skip


@dataclass
class _Rows:
    """The loss, which learns from windows of the lesson alone: `said` are their ids."""

    said: frozenset[tuple[int, ...]]

    def __call__(self, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
        """NLL of a batch. Raises `EvaluationError` for a row that is no window of the lesson."""
        batch = pair["forget"]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            if tuple(ids[mask].tolist()) not in self.said:
                raise EvaluationError("a row to be trained on is no window of the lesson: nothing more is trained")
        return nll(model, batch)

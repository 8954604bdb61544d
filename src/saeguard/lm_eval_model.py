"""A guarded model for the Language Model Evaluation Harness: its model type `saeguard`.

The harness finds only the model types it brings, and those of modules that were imported before it looks. So its own
command is run from here, with the same arguments:

    python -m saeguard.lm_eval_model --model saeguard --model_args pretrained=M,guardrail=DIR --tasks T

The harness's Hugging Face model does all the work, on a model that is guarded for as long as it lives. Scores of
answers that are given are what the guarded model makes of them. Text that is generated is the clamped model's under
the action `refuse` too: what a server would put in its place is not an answer to score.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, get_args
from weakref import finalize

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from saeguard.choices import Action
from saeguard.errors import AttachError, GuardrailError, UsageError
from saeguard.guardrail import Guardrail
from saeguard.online.verdicts import Verdict, verdicts

PADDING = 0
"""What the harness fills shorter rows up with, on the right and without a mask, when it scores given answers."""


@register_model("saeguard")
class GuardedLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with a guardrail on it, until it is closed or forgotten.

    `guardrail` is a folder or a hub id, `action` takes the place of the guardrail's own; all else is as in `HFLM`.
    Raises an `ArtifactError` or `AttachError` before anything is scored where the guardrail does not fit.
    """

    def __init__(self, pretrained: Any, guardrail: str, action: Action | None = None, **options: Any) -> None:
        if action not in (None, *get_args(Action)):
            raise UsageError(f"action={action}: expected one of {', '.join(get_args(Action))}")
        found = Guardrail.from_pretrained(guardrail)
        if action is not None:
            found = replace(found, rules=tuple(replace(rule, action=action) for rule in found.rules))
        super().__init__(pretrained, **options)
        self.read: Counter[str] = Counter()
        """Sequences that each rule has read; `triggered` those on which it fired. A given answer is one each."""
        self.triggered: Counter[str] = Counter()
        stack = ExitStack()
        self._guard = stack.enter_context(found.attach(self.model, self.tokenizer))
        self._blocks = any(rule.gate.moment == "block" for rule in found.rules)
        self._release = finalize(self, stack.close)

    def close(self) -> None:
        """Take the guardrail off the model."""
        self._release()

    def get_model_info(self) -> dict[str, Any]:
        """As in the harness, which writes it into its results; with what each rule has read and fired on."""
        counts = {rule: {"read": read, "triggered": self.triggered[rule]} for rule, read in self.read.items()}
        return {**super().get_model_info(), "saeguard": counts}

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        text = inps.ne(PADDING).flip(1).cumsum(dim=1).flip(1) > 0
        if self._blocks and not bool(text.all()):
            raise AttachError(
                "this guardrail decides by whole texts, and the harness gives no mask to tell its padding from text. "
                "Use batch_size=1."
            )
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        if (track := self._guard.last) is not None:
            read = replace(track, attended=track.attended & text.to(track.attended.device))
            self._count(verdicts(read, self._guard.guardrail.rules))
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        out: Tensor = super()._model_generate(context, max_length, stop, **options)
        if len(self._guard.all_verdicts) != len(out):  # beams, of which one each was taken
            self._guard.judge(out)
        self._count(self._guard.all_verdicts)
        return out

    def _detect_batch_size(self, *args: Any, **options: Any) -> int:
        counts = self.read.copy(), self.triggered.copy()
        size: int = super()._detect_batch_size(*args, **options)
        self.read, self.triggered = counts
        return size

    def _count(self, rows: list[list[Verdict]]) -> None:
        for row in rows:
            self.read.update(verdict.rule for verdict in row)
            self.triggered.update(verdict.rule for verdict in row if verdict.triggered)


def main() -> None:
    """The harness's own command. A guardrail that cannot be used ends it with a message and status 1."""
    try:
        cli_evaluate()
    except GuardrailError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

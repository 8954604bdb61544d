"""Guarded generation: prompts in, answers with their verdicts out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from saeguard.choices import REFUSAL as REFUSAL
from saeguard.guardrail import Guardrail
from saeguard.model import input_device
from saeguard.online.intervention import Verdict
from saeguard.windows import bos_ids, chat_ids

Message = dict[str, str]


@dataclass(frozen=True)
class Generation:
    """How answers are drawn."""

    max_new_tokens: int = 80
    temperature: float = 0.0
    """0 is greedy."""


@dataclass(frozen=True)
class Answer:
    """An answer; `verdict` is None without a guardrail."""

    text: str
    verdict: Verdict | None


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """The ids of a prompt or of a conversation, in the chat template where there is one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is not None:
        return chat_ids(tokenizer, messages)
    text = "\n".join(message["content"] for message in messages)
    return bos_ids(tokenizer) + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(
    model: Any, tokenizer: Any, prompt: str | Sequence[Message], guardrail: Guardrail | None, how: Generation
) -> Answer:
    """One answer. Under the action `refuse` a triggered answer is replaced by `REFUSAL`."""
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=input_device(model))
    sampling = {"do_sample": True, "temperature": how.temperature} if how.temperature else {"do_sample": False}
    with nullcontext() if guardrail is None else guardrail.attach(model, tokenizer) as guard:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=how.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, **sampling,
        )  # fmt: skip
        verdicts, refuses = (guard.all_verdicts[0], guard.refusals[0]) if guard else ([], False)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    if refuses:
        text = REFUSAL
    return Answer(text, max(verdicts, key=lambda v: (v.triggered, v.statistic - v.threshold), default=None))

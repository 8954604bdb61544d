"""What the tests of the model side share beyond the fixtures: a slow guard to compare with, prompts, thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import make_guardrail
from saeguard.clamp import Clamp
from saeguard.gate import Cusum, Evidence, Gate
from saeguard.guardrail import Guardrail
from saeguard.model import decoder_layer
from saeguard.online.intervention import Guard, Verdict
from saeguard.rule import Rule
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.tokens import special_token_ids

PAD, BOS = 0, 1
NEW = 10
MONITOR_BOUND = 1e9


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random sequences of ordinary tokens (1, length), each after a BOS."""
    generator = torch.Generator().manual_seed(seed)
    bodies = (torch.randint(6, 320, (1, length - 1), generator=generator) for length in lengths)
    return [torch.cat([torch.full((1, 1), BOS), body], dim=1) for body in bodies]


def padded(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """A batch of rows (1, length), padded on one side."""
    width = max(row.shape[1] for row in rows)
    gaps = [(width - row.shape[1], 0) if side == "left" else (0, width - row.shape[1]) for row in rows]
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.cat([pad(row, gap, value=PAD) for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.cat([pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)]),
    }


def with_rule(guardrail: Guardrail, **changes: Any) -> Guardrail:
    """The guardrail with another name, threshold, action, ... of its rule."""
    return replace(guardrail, rules=(replace(guardrail.rule, **changes),))


def mixed_guardrail(
    model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder, rows: Sequence[Tensor], **changes: Any
) -> Guardrail:
    """A cusum guardrail whose bound some rows pass in the prompt, some only in the next `NEW` tokens, some never."""
    weights = torch.tensor([1.0, 0.7, -0.6, 1.3, 0.4, -0.9])
    features = list(range(0, 60, 10))
    gate = Gate(Evidence(weights, 0.013), Cusum(drift=0.3))
    rule = {
        "features": features,
        "gate": gate,
        "threshold": MONITOR_BOUND,
        "clamp": Clamp("dense", c=40.0, strength=8.0),
    }
    guardrail = make_guardrail(model, tokenizer, sae, 1, **{**rule, **changes})
    with guardrail.attach(model, tokenizer) as guard:
        read, written = [], []
        for row in rows:
            whole = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, min_new_tokens=NEW)
            read.append(guard.judge(row)[0].statistic)
            written.append(guard.judge(whole[:, :-1])[0].statistic)
    values = sorted({*read, *written})
    for gap, threshold in sorted(((high - low, (high + low) / 2) for low, high in pairwise(values)), reverse=True):
        early, late = [r > threshold for r in read], [w > threshold for w in written]
        when = {"prompt" if r else "later" if w else "never" for r, w in zip(early, late, strict=True)}
        if len(when) == 3 and gap > 0.01:
            return with_rule(guardrail, threshold=threshold)
    raise AssertionError(f"no threshold tells three kinds of rows apart: {read} {written}")


@contextmanager
def slow_guard(model: PreTrainedModel, tokenizer: Any, guardrail: Guardrail, sae: SparseAutoencoder) -> Iterator[None]:
    """The guardrail in its longest form: no state, no cache, the full SAE, one token after the other."""
    special = set(special_token_ids(tokenizer))
    seen: dict[str, Tensor] = {}

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        seen["mask"] = torch.ones_like(seen["ids"]) if mask is None else mask

    def after(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        assert hidden.shape[1] == seen["ids"].shape[1] == seen["mask"].shape[1], "the slow guard works without cache"
        changed = hidden.clone()
        for i in range(len(hidden)):
            for t in _clamped_tokens(guardrail.rule, sae, hidden[i], seen["ids"][i], seen["mask"][i].bool(), special):
                changed[i, t] = _clamped(guardrail.rule, sae, hidden[i, t])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        decoder_layer(model, guardrail.layer).register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clamped_tokens(
    rule: Rule, sae: SparseAutoencoder, hidden: Tensor, ids: Tensor, mask: Tensor, special: set[int]
) -> list[int]:
    a = sae.encode(hidden)[:, list(rule.features)]
    hot_features = rule.gate.clamped(len(rule.features))
    first = int(mask.long().argmax())
    total, count, triggered, hot, over = 0.0, 0, False, [], []
    for t in range(len(ids)):
        if not mask[t]:
            continue
        by_authors = rule.gate.counts == "attended"
        eligible = t != first and (by_authors or int(ids[t]) not in special)
        is_hot = eligible and bool((a[t, hot_features] > 0).any())
        if eligible or by_authors:
            if isinstance(rule.gate.scorer, Evidence):
                step = float((a[t] > 0).double() @ rule.gate.scorer.weights.double()) + rule.gate.scorer.bias
            else:
                step = float(is_hot)
            if isinstance(rule.gate.accumulator, Cusum):
                total = max(0.0, total + step - rule.gate.accumulator.drift)
            else:
                total, count = total + step, count + 1
        statistic = total / count if count else total
        triggered = triggered or statistic > rule.threshold
        hot += [t] if is_hot else []
        over += [t] if triggered else []
    if rule.gate.moment == "block":
        return hot if statistic > rule.threshold else []
    if rule.reaches_back:
        return hot if triggered else []
    return [t for t in hot if t in over]


def slow_logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    """Logits (1, length, vocabulary): after each token of a row (1, length), those of the tokens up to it alone."""
    with torch.no_grad():
        return torch.cat([model(row[:, :end]).logits[:, -1:] for end in range(1, row.shape[1] + 1)], dim=1)


def _clamped(rule: Rule, sae: SparseAutoencoder, h: Tensor) -> Tensor:
    a = sae.encode(h[None])[0]
    clamped = a.clone()
    picked = rule.gate.clamped(len(rule.features))
    for j, used in zip(rule.features, picked, strict=True):
        if used and (rule.clamp.kind == "dense" or a[j] > 0):
            clamped[j] = -rule.clamp.c
    return sae.decode(clamped) + (h - sae.decode(a))


def same_verdicts(found: Sequence[Verdict], expected: Sequence[Verdict]) -> None:
    """Fail unless the verdicts agree; statistics up to float rounding."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.statistic == pytest.approx(theirs.statistic, abs=1e-4)
        assert (mine.triggered, mine.first_token) == (theirs.triggered, theirs.first_token)
        assert mine.features == theirs.features


def generate(model: PreTrainedModel, inputs: Tensor | dict[str, Tensor], **options: Any) -> Any:
    """`model.generate` of exactly `NEW` tokens."""
    inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)} if isinstance(inputs, Tensor) else inputs
    return model.generate(**inputs, **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options})


def hooks_on(model: PreTrainedModel) -> int:
    """How many hooks there are on the model and its parts."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def judged(guard: Guard, rows: Sequence[Tensor]) -> list[Verdict]:
    """Verdicts on rows (1, length), one by one."""
    return [guard.judge(row)[0] for row in rows]

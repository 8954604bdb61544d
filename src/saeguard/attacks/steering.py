"""The residual stream, white box: the guard is left on, and the stream is changed around it.

    direction-removed  behind the clamp, the mean of what the clamp adds is taken off again at every token that lies as
                       far along it as clamped ones do (directional ablation, Arditi et al. 2024, arXiv 2406.11717,
                       sets the component of all tokens to one value and loses what they differ in)
    error-steered      in front of the guard, one vector is added at every token. It is at right angles to all that the
                       guard reads, so that triggers and clamp stay as they are and it passes in what the SAE's
                       reconstruction leaves out (arXiv 2606.18322)

Both are found on other questions on the topic, never on those that are attacked.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard.artifact import fingerprint
from saeguard.attacks.reading import with_options
from saeguard.evaluation.provenance import items_fingerprint
from saeguard.evaluation.subject import Attach, Subject
from saeguard.evaluation.tasks.multiple_choice import QuestionItem
from saeguard.gate import Probe
from saeguard.guardrail import Guardrail
from saeguard.hooks import at
from saeguard.model import capture, input_device, port_at
from saeguard.online.passes import only_the_last
from saeguard.online.verdicts import Watch
from saeguard.progress import progress
from saeguard.windows import pad_rows

BATCH = 4
"""Questions read at once, each with all its options."""
LEARNING_RATE = 0.005
"""Of Adam, in units of the median norm of the residual stream."""
NEAR = 0.5
"""How far from where the clamp moves a token, in lengths of the move, one counts as moved by it."""
SAYS = {
    "direction-removed": "behind the guard, the mean of what the clamp adds is taken off again where it was added",
    "error-steered": "one vector added in front of the guard at right angles to what it reads, trained on other "
    "questions to bring the answers back",
}


@dataclass(frozen=True)
class Rows:
    """Questions with each of their options: ids and mask (rows, tokens), which tokens are of the option, and for each
    question the place of the right one."""

    ids: Tensor
    mask: Tensor
    option: Tensor
    right: Tensor

    @classmethod
    def of(cls, tokenizer: Any, items: Sequence[QuestionItem], device: torch.device) -> Rows:
        """Rows of questions that have equally many options."""
        rows, starts = with_options(tokenizer, items)
        ids, mask = pad_rows(rows)
        place = torch.arange(ids.shape[1])
        option = (place >= torch.tensor(starts)[:, None]) & mask.bool()
        right = torch.tensor([item.question.answer for item in items])
        return cls(*(part.to(device) for part in (ids, mask, option, right)))


def steered(
    name: str, subject: Subject, guardrail: Guardrail, items: Sequence[QuestionItem], steps: int, kept: Path
) -> Subject:
    """The subject under this attack around one of its guardrails, which is found on `items`; what took long to find is
    in the folder `kept`."""
    if name == "direction-removed":
        change, identity = _without_direction(subject, guardrail, items)
        attach = _behind(subject, guardrail, change)
        return replace(subject, attach=attach, identity={**subject.identity, "steered": identity})
    vector = _found(subject, guardrail, items, steps, kept)
    attach = in_front(subject, guardrail, lambda values: values + vector.to(values))
    return replace(subject, attach=attach, identity={**subject.identity, "steered": _digest(vector)})


def _behind(subject: Subject, guardrail: Guardrail, change: Callable[[Tensor], Tensor]) -> Attach:
    @contextmanager
    def attach(model: Any, tokenizer: Any) -> Iterator[Watch | None]:
        with _guarded(subject, model, tokenizer) as guard, at(_port_behind(model, guardrail), change):
            yield guard

    return attach


def in_front(subject: Subject, guardrail: Guardrail, change: Callable[[Tensor], Tensor]) -> Attach:
    """The subject's context with a change of the values that the guardrail reads."""

    @contextmanager
    def attach(model: Any, tokenizer: Any) -> Iterator[Watch | None]:
        with at(port_at(model, guardrail.point), change), _guarded(subject, model, tokenizer) as guard:
            yield guard

    return attach


def _guarded(subject: Subject, model: Any, tokenizer: Any) -> AbstractContextManager[Watch | None]:
    """The model as the subject is judged: other guards may stand behind the one that is attacked."""
    return nullcontext() if subject.attach is None else subject.attach(model, tokenizer)


def _port_behind(model: Any, guardrail: Guardrail) -> Any:
    return port_at(model, replace(guardrail.point, hook=guardrail.hook_out))


def _without_direction(
    subject: Subject, guardrail: Guardrail, items: Sequence[QuestionItem]
) -> tuple[Callable[[Tensor], Tensor], str]:
    """The change that takes the clamp's mean move out again, at tokens that lie about as far along it as it moves them:
    the first token of a sequence may lie farther, and a model whose first token is changed is lost."""
    model, tokenizer = subject.loader.loaded
    point, port = replace(guardrail.point, hook=guardrail.hook_out), _port_behind(model, guardrail)
    before: list[Tensor] = []
    moved, plain = [], []
    for start in range(0, len(items), BATCH):
        rows = Rows.of(tokenizer, items[start : start + BATCH], input_device(model))
        with at(port, lambda its: before.append(its.clone())), _guarded(subject, model, tokenizer), only_the_last():
            after = capture(model, [point], rows.ids, rows.mask)[point]
        there = (after != before[-1]).any(dim=-1)
        moved.append((after - before[-1])[there].float())
        plain.append(before[-1][there].float())
        before.clear()
    mean = torch.cat(moved).mean(dim=0)
    length, direction = mean.norm(), torch.nn.functional.normalize(mean, dim=0)
    level = (torch.cat(plain) @ direction).median()

    def change(values: Tensor) -> Tensor:
        along = values.float() @ direction.to(values.device)
        there = ((along - level.to(along.device)) / length.to(along.device) - 1).abs() < NEAR
        return torch.where(there[..., None], (values.float() - mean.to(values.device)).to(values.dtype), values)

    return change, _digest(torch.cat([mean, level[None]]))


def _found(subject: Subject, guardrail: Guardrail, items: Sequence[QuestionItem], steps: int, kept: Path) -> Tensor:
    """The vector (d_model,), from the file that an earlier search has left if there is one."""
    parts = [fingerprint(guardrail.rules), dict(subject.identity), items_fingerprint(items), steps]
    path = kept / f"error-steered-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"
    path = path.with_suffix(".safetensors")
    if not path.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        vector, _ = search(subject, guardrail, items, steps, show=True)
        save_file({"vector": vector}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return load_file(path)["vector"]


def search(
    subject: Subject,
    guardrail: Guardrail,
    items: Sequence[QuestionItem],
    steps: int,
    *,
    seconds: float = math.inf,
    show: bool = False,
) -> tuple[Tensor, int]:
    """The vector (d_model,) in front of the guard, at right angles to what it reads, under which the right options have
    least cross-entropy over the options' mean log-probabilities, by Adam; and the passes that took."""
    model, tokenizer = subject.loader.loaded
    device = input_device(model)
    read = _read_by(guardrail).to(device)
    scale = max(float(rule.evidence.get("median_residual_norm") or 1.0) for rule in guardrail.rules)
    vector = torch.zeros(len(read), device=device, requires_grad=True)
    optimiser = torch.optim.Adam([vector], lr=LEARNING_RATE * scale)

    def unread() -> Tensor:
        return vector - read @ (read.T @ vector)

    batches = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    attach = in_front(subject, guardrail, lambda values: values + unread().to(values.dtype))
    begun, step = time.monotonic(), 0
    with progress("steering", steps, unit="steps", show=show) as advance, attach(model, tokenizer), only_the_last():
        while step < steps and time.monotonic() - begun < seconds:
            rows = Rows.of(tokenizer, batches[step % len(batches)], device)
            (vector.grad,) = torch.autograd.grad(_loss(model, rows), vector)
            optimiser.step()
            step += 1
            advance(1)
    return unread().detach().cpu(), step


def _read_by(guardrail: Guardrail) -> Tensor:
    """An orthonormal basis (d_model, k) of the directions that the guard reads: features and probes."""
    columns = [rule.encoder.columns.float() for rule in guardrail.rules]
    columns += [
        rule.gate.scorer.weights.float()[:, None] for rule in guardrail.rules if isinstance(rule.gate.scorer, Probe)
    ]
    basis: Tensor = torch.linalg.qr(torch.cat([part.cpu() for part in columns], dim=1)).Q
    return basis


def _loss(model: Any, rows: Rows) -> Tensor:
    logits = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits[:, :-1].float()
    of_next = logits.log_softmax(dim=-1).gather(2, rows.ids[:, 1:, None])[..., 0]
    option = rows.option[:, 1:]
    scores = (of_next * option).sum(dim=1) / option.sum(dim=1)
    return torch.nn.functional.cross_entropy(scores.view(len(rows.right), -1), rows.right)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

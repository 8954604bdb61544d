"""`PromptGate`: a classifier of prompts as the gate of an unchanged model, and what a triggered prompt leads to.

    refuse    the answer is the refusal
    corrupt   noise is added to the embeddings of the prompt's tokens: embedding-corrupted prompts (ECO, Liu et al.,
              arXiv 2406.07933)
    monitor   nothing

    e'_t = e_t + strength * s * z_t      s = standard deviation of the embedding matrix; z_t ~ N(0, I), fixed by seed, t

The paper finds its strength by zeroth-order search towards a model that never knew; here it is a setting, chosen like
every other. A prompt is what a forward pass without a filled cache reads: text that is read on from a cache (a later
turn, the second chunk of a prompt, what is generated) is neither judged nor changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.baselines.prompts import Classifier, Sentences, Tfidf
from saeguard.choices import PromptAction
from saeguard.errors import ArtifactDamagedError, AttachError
from saeguard.folders import Kind, canonical, read_folder, write_folder
from saeguard.guardrail import Guardrail
from saeguard.hooks import around, at, inputs_of
from saeguard.model import embedding_port, entrances
from saeguard.online.passes import READ_AGAIN
from saeguard.online.verdicts import Verdict
from saeguard.tokens import attended_tokens, special_token_ids

KIND = Kind("prompt gate", "prompt_gate.json", "prompt_gate.safetensors", version=1)


@dataclass(frozen=True)
class PromptGate:
    """A classifier, its threshold, and what is done with a prompt above it. `evidence` holds calibration figures."""

    name: str
    classifier: Classifier
    threshold: float
    action: PromptAction
    strength: float = 0.0
    seed: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def attach(self, model: nn.Module, tokenizer: Any) -> Iterator[PromptGuard]:
        """Judge every prompt that the model reads inside the block; afterwards the model is as it was."""
        guard = PromptGuard(self, model, tokenizer)
        with ExitStack() as stack:
            for module in entrances(model):
                stack.enter_context(around(module, guard.before_model, guard.after_model))
            if self.action == "corrupt":
                stack.enter_context(at(embedding_port(model), guard.corrupt))
            yield guard

    @property
    def identity(self) -> dict[str, Any]:
        """The gate by its content: what it holds, not where it lies."""
        digest = hashlib.sha256(canonical({**_content(self), "evidence": {}, "terms": _terms(self)}).encode())
        for name, tensor in sorted(_tensors(self).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return {"prompt_gate": digest.hexdigest()[:16]}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all. Raises `ArtifactError`."""
        write_folder(KIND, Path(folder), {**_content(self), "terms": _terms(self)}, _tensors(self), {})
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PromptGate:
        """Read a folder. Raises an `ArtifactError` on any damage or foreign format."""
        content, tensors = read_folder(KIND, Path(folder))
        try:
            encoder = content["encoder"]
            vectors = Tfidf(tuple(content["terms"]), tensors["idf"]) if encoder is None else Sentences(encoder)
            classifier = Classifier(vectors, tensors["weights"], content["bias"])
            fields = {name: content[name] for name in ("name", "threshold", "action", "strength", "seed", "evidence")}
            return cls(classifier=classifier, **fields)
        except (KeyError, TypeError) as error:
            raise ArtifactDamagedError(f"cannot read the prompt gate {folder}: {error!r}") from error


class PromptGuard:
    """A prompt gate at work. `verdicts` has one entry for each prompt of the last pass that read any."""

    def __init__(self, gate: PromptGate, model: nn.Module, tokenizer: Any) -> None:
        self.verdicts: list[Verdict] = []
        self.acting: Sequence[bool] | None = None
        """Which prompts of the passes to come may be changed; None: all of them. Every one is judged."""
        self._gate, self._tokenizer = gate, tokenizer
        self._special = torch.tensor(special_token_ids(tokenizer))
        matrix: Any = embedding_port(model).module
        self._deviation = float(matrix.weight.detach().float().std())
        self._depth = 0
        self._places: Tensor | None = None

    @property
    def refusals(self) -> list[bool]:
        """Which prompts are refused."""
        return [self._gate.action == "refuse" and verdict.triggered for verdict in self.verdicts]

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the model and each part of it that holds the layers: the outermost one judges the prompts."""
        self._depth += 1
        if self._depth > 1:
            return
        if READ_AGAIN.get() is not None:
            self._check_untouched()
            return
        inputs = inputs_of(module, args, kwargs)
        ids, filled = inputs.get("input_ids"), inputs.get("past_key_values")
        if not isinstance(ids, Tensor):
            raise AttachError("a prompt gate reads `input_ids`, and the model was called without: nothing was judged")
        self._places = None
        if filled is None or filled.get_seq_length() == 0:
            past = ids.new_zeros(len(ids), 0, dtype=torch.bool)
            self._judge(ids, attended_tokens(inputs.get("attention_mask"), ids, past))

    def after_model(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
        """Hook after each of them, also where the pass raised."""
        self._depth -= 1

    def corrupt(self, embeddings: Tensor) -> Tensor | None:
        """At the embeddings (batch, tokens, d_model): add the noise of each place, counted from 1; 0 is left alone."""
        if self._places is None:
            return None
        count, width = int(self._places.max()), embeddings.shape[-1]
        noise = torch.stack([torch.zeros(width), *(_noise(self._gate.seed, i + 1, width) for i in range(count))])
        added = noise.to(embeddings.device)[self._places] * (self._gate.strength * self._deviation)
        return torch.where(self._places[..., None] > 0, (embeddings + added).to(embeddings.dtype), embeddings)

    def _judge(self, ids: Tensor, attended: Tensor) -> None:
        """Verdicts on prompts (batch, tokens), and the places of the tokens that are to be corrupted."""
        rows = [row[kept] for row, kept in zip(ids.cpu(), attended.cpu(), strict=True)]
        texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        self.verdicts = [self._verdict(score) for score in self._gate.classifier.scores(texts)]
        acting = self.acting or [True] * len(rows)
        triggered = torch.tensor(
            [verdict.triggered and its for verdict, its in zip(self.verdicts, acting, strict=True)], device=ids.device
        )
        changed = attended & triggered[:, None] & ~torch.isin(ids, self._special.to(ids.device))
        if bool(changed.any()):
            self._places = torch.where(changed, attended.cumsum(dim=1), 0)

    def _check_untouched(self) -> None:
        """A guardrail reads again what was judged when it came. Raises `AttachError` if this corrupts it."""
        if self._gate.action == "corrupt":
            raise AttachError(
                "a guardrail reads a sequence again whose prompt this gate corrupted as it came. Use one of the two."
            )

    def _verdict(self, score: float) -> Verdict:
        triggered = score > self._gate.threshold
        return Verdict(self._gate.name, score, self._gate.threshold, triggered, 0 if triggered else None, ())


def load(source: str | Path) -> Guardrail | PromptGate:
    """What a folder (or, of guardrails, a hub id) holds. Raises an `ArtifactError`."""
    return (PromptGate if KIND.is_at(source) else Guardrail).from_pretrained(source)


@cache
def _noise(seed: int, place: int, width: int) -> Tensor:
    """The noise (width,) of a place: the same whatever else is in the batch."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed << 32 | place))


def _content(gate: PromptGate) -> dict[str, Any]:
    vectors = gate.classifier.vectors
    return {
        "name": gate.name, "threshold": gate.threshold, "action": gate.action, "strength": gate.strength,
        "seed": gate.seed, "bias": gate.classifier.bias, "evidence": dict(gate.evidence),
        "encoder": vectors.model if isinstance(vectors, Sentences) else None,
    }  # fmt: skip


def _terms(gate: PromptGate) -> list[str]:
    vectors = gate.classifier.vectors
    return list(vectors.terms) if isinstance(vectors, Tfidf) else []


def _tensors(gate: PromptGate) -> dict[str, Tensor]:
    vectors = gate.classifier.vectors
    idf = {"idf": vectors.idf} if isinstance(vectors, Tfidf) else {}
    return {"weights": gate.classifier.weights, **idf}

"""Text to what an SAE is given and what it should give back, at one layer or at several.

Documents of the `fit` split alone are read, so that what a guardrail is calibrated and tested on stays unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.activations import check_finite
from saeguard.corpus import Corpus
from saeguard.hookpoints import HookPoint
from saeguard.model import capture, input_device
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.tokens import special_token_ids, token_masks
from saeguard.windows import Window, Windower, batches, chat_ids, pad

WINDOW_TOKENS = 256
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    model: nn.Module
    tokenizer: Any
    sae: SparseAutoencoder
    layer: int


@dataclass(frozen=True)
class Rows:
    """Input `x` (tokens, d_in) and target `y` (tokens, d_out) of an SAE, float32: the same but for transcoders."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, picked: Tensor | slice) -> Rows:
        return Rows(self.x[picked], self.y[picked])

    @staticmethod
    def join(parts: Iterable[Rows]) -> Rows:
        """All rows, in order."""
        parts = list(parts)
        return Rows(torch.cat([rows.x for rows in parts]), torch.cat([rows.y for rows in parts]))


@dataclass(frozen=True)
class Reading:
    """Rows of the valid tokens by layer, and norms of the first tokens and of other special tokens at the subject's."""

    rows: Mapping[int, Rows]
    first: Tensor
    special: Tensor


def sample_windows(tokenizer: Any, corpora: Sequence[Corpus], tokens: int) -> dict[str, list[Window]]:
    """About `tokens` tokens of windows by corpus, an equal share of each, from its first documents."""
    windower = Windower(tokenizer, (WINDOW_TOKENS,))
    share = tokens // len(corpora)
    return {corpus.name: list(_up_to(share, windower, corpus)) for corpus in corpora}


def _up_to(tokens: int, windower: Windower, corpus: Corpus) -> Iterator[Window]:
    for document in corpus.documents():
        if document.split != "fit":
            continue
        for window in windower.cut(document):
            if tokens <= 0:
                return
            tokens -= len(window.ids)
            yield window


def in_chat(tokenizer: Any, windows: Iterable[Window]) -> list[Window]:
    """The same texts, each as a user's message in the chat template."""
    return [
        replace(window, ids=tuple(chat_ids(tokenizer, [{"role": "user", "content": window.text.strip()}])))
        for window in windows
    ]


def read(subject: Subject, windows: Sequence[Window], layers: Sequence[int] = ()) -> Reading:
    """Run at least one window through the model; keep the subject's layer, or these, it among them.

    Raises `NonFiniteError` where the subject's layer is not made of numbers.
    """
    layers = list(layers) or [subject.layer]
    parts = list(_parts(subject, windows, layers))
    return Reading(
        rows={layer: Rows.join(part.rows[layer] for part in parts) for layer in layers},
        first=torch.cat([part.first for part in parts]),
        special=torch.cat([part.special for part in parts]),
    )


def _parts(subject: Subject, windows: Sequence[Window], layers: Sequence[int]) -> Iterator[Reading]:
    sae = subject.sae
    device, special = input_device(subject.model), torch.tensor(special_token_ids(subject.tokenizer))
    points = {layer: (HookPoint(layer, sae.hook), HookPoint(layer, sae.hook_out)) for layer in layers}
    here = HookPoint(subject.layer, sae.hook_out)
    for batch in batches(windows, tokens=BATCH_TOKENS):
        ids, mask = pad(batch, pad_id=subject.tokenizer.pad_token_id or 0)
        wanted = [*{point for both in points.values() for point in both}]
        values = capture(subject.model, wanted, ids.to(device), mask.to(device))
        masks = token_masks(ids, mask.bool(), special)
        norms = values[here].float().norm(dim=-1).cpu()
        check_finite(norms[masks.attended], here)
        yield Reading(
            rows={layer: _rows(values, both, masks.valid, sae) for layer, both in points.items()},
            first=norms[masks.first],
            special=norms[masks.attended & ~masks.first & ~masks.valid],
        )


def _rows(
    values: Mapping[HookPoint, Tensor], points: tuple[HookPoint, HookPoint], valid: Tensor, sae: SparseAutoencoder
) -> Rows:
    x, y = (values[point][valid.to(values[point].device)].float().to(sae.W_enc.device) for point in points)
    return Rows(x, y)

"""`Peaks`: for every feature of an SAE the k windows in which it is strongest, in tensors of a fixed size.

A window enters with its strongest valid token, so the k contexts of a feature come from k windows. Memory does not
grow with the text: (d_sae, k) activations, and as many contexts of `2 CONTEXT + 1` token ids around the peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from saeguard.passages import CONTEXT

NO_TOKEN = -1


@dataclass(frozen=True)
class Peaks:
    """The strongest windows of every feature, by falling activation; of equals, the one read first.

    `activations` (d_sae, k) float32, 0 where there is none; `contexts` (d_sae, k, 2 CONTEXT + 1) token ids,
    `NO_TOKEN` outside the window; `corpus` (d_sae, k) the number of the corpus.
    Over all valid tokens: `fired` (d_sae), how many each feature is active at, and `tokens` (vocabulary), how often
    each token occurs.
    """

    activations: Tensor
    contexts: Tensor
    corpus: Tensor
    fired: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, d_sae: int, k: int, vocabulary: int) -> Self:
        """Nothing read yet."""
        return cls(
            activations=torch.zeros(d_sae, k),
            contexts=torch.full((d_sae, k, 2 * CONTEXT + 1), NO_TOKEN, dtype=torch.int32),
            corpus=torch.zeros(d_sae, k, dtype=torch.int32),
            fired=torch.zeros(d_sae, dtype=torch.int64),
            tokens=torch.zeros(vocabulary, dtype=torch.int64),
        )

    def count(self, a: Tensor, ids: Tensor) -> Peaks:
        """With the valid tokens of a window counted: their activations (tokens, d_sae) and ids (tokens,)."""
        fired = self.fired + torch.count_nonzero(a, dim=0).cpu()
        return replace(self, fired=fired, tokens=self.tokens + torch.bincount(ids.cpu(), minlength=len(self.tokens)))

    def merge(self, highest: Tensor, at: Tensor, ids: Tensor, corpus: int) -> Peaks:
        """With some windows more: `highest` (windows, d_sae) and the token `at` (windows, d_sae) which it is found.

        `ids` (windows, tokens) are padded with `NO_TOKEN`.
        """
        k = self.activations.shape[1]
        together = torch.cat([self.activations, highest.T], dim=1)
        order = together.sort(dim=1, descending=True, stable=True).indices[:, :k]
        rows = torch.arange(len(order))[:, None].expand_as(order)
        new = order >= k
        window = order[new] - k
        around = pad(ids, (CONTEXT, CONTEXT), value=NO_TOKEN).unfold(1, 2 * CONTEXT + 1, 1)
        contexts = self.contexts[rows, order.clamp(max=k - 1)]
        contexts[new] = around[window, at[window, rows[new]]].int()
        numbers = self.corpus[rows, order.clamp(max=k - 1)]
        numbers[new] = corpus
        return replace(self, activations=together.gather(1, order), contexts=contexts, corpus=numbers)

"""Which tokens count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saeguard.errors import AttachError
from saeguard.tokens import attended_tokens, special_token_ids, token_masks, without_padding

SPECIAL = torch.tensor([0, 1, 2])
NOTHING = torch.zeros(1, 0, dtype=torch.bool)


def test_padding_special_tokens_and_the_first_token_are_not_valid() -> None:
    ids = torch.tensor([[0, 0, 1, 9, 2, 8], [7, 9, 8, 1, 0, 0]])
    attended = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    masks = token_masks(ids, attended, SPECIAL)
    assert masks.first.int().tolist() == [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert masks.valid.int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]


def test_the_first_token_of_a_continued_sequence_counts() -> None:
    ids, attended = torch.tensor([[9, 8], [9, 8]]), torch.ones(2, 2, dtype=torch.bool)
    masks = token_masks(ids, attended, SPECIAL, started=torch.tensor([True, False]))
    assert masks.valid.int().tolist() == [[1, 1], [0, 1]]


def test_special_tokens_are_all_that_the_tokenizer_calls_special(tokenizer: Any) -> None:
    names = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert special_token_ids(tokenizer) == tuple(sorted(tokenizer.convert_tokens_to_ids(names)))


def test_padding_is_left_out_at_both_ends_only() -> None:
    ids = torch.tensor([[0, 0, 5, 0, 6, 0]])
    assert without_padding(ids, 0).tolist() == [[0, 0, 1, 1, 1, 0]]
    assert without_padding(ids, None).tolist() == [[1] * 6]


@pytest.mark.parametrize("kind", ["none", "two", "bool", "additive", "mapping"])
def test_attended_tokens_of_every_kind_of_mask(kind: str) -> None:
    keys = torch.tensor([[False, True, True, True]])
    causal = (keys[:, None] & torch.ones(4, 4, dtype=torch.bool).tril())[:, None]
    room = torch.nn.functional.pad(causal, (0, 3))
    masks: dict[str, Any] = {
        "none": None, "two": keys.long(), "bool": room, "additive": torch.where(room, 0.0, -1e30),
        "mapping": {"sliding_attention": None, "full_attention": room},
    }  # fmt: skip
    whole = attended_tokens(masks[kind], torch.ones(1, 4), NOTHING)
    assert whole.tolist() == ([[True] * 4] if kind == "none" else keys.tolist())


def test_attended_tokens_after_others() -> None:
    past = torch.tensor([[False, True]])
    mask = torch.tensor([[0, 1, 1, 0]])
    assert attended_tokens(mask, torch.ones(1, 2), past).tolist() == [[True, False]]
    four = torch.tensor([[[[False, True, True, False], [False, True, True, False]]]])
    assert attended_tokens(four, torch.ones(1, 2), past).tolist() == [[True, False]]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 3),
        torch.ones(2, 4),
        torch.ones(1, 1, 4, 4).bool(),
        torch.ones(4),
        "flex",
        torch.ones(1, 1, 4, 2).bool(),
    ],
    ids=["short", "rows", "not causal", "one dimension", "foreign", "sliding"],
)
def test_other_masks_are_refused(mask: Any) -> None:
    with pytest.raises(AttachError, match="attention mask"):
        attended_tokens(mask, torch.ones(1, 4), NOTHING)

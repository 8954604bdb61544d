"""Windows: every token of a document once, never across documents, whole where it fits; batches and padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import SENTENCES, make_tokenizer
from saeguard.corpus import Document
from saeguard.windows import MIN_TOKENS, Window, Windower, batches, bos_ids, chat_ids, pad, pad_rows, text_ids

LENGTHS = (10, 20, 40)


def long_text(words: int, seed: int) -> str:
    parts = " ".join(SENTENCES).split()
    return " ".join(parts[(seed * 7 + 3 * i) % len(parts)] for i in range(words))


def window(length: int, start: int = 0) -> Window:
    return Window(0, "fit", length, tuple(range(start, start + length)), "")


@given(words=st.integers(1, 120), seed=st.integers(0, 50))
def test_windows_of_a_document_are_its_tokens_in_order(tokenizer, words, seed):
    document = Document(3, long_text(words, seed))
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    found = list(Windower(tokenizer, LENGTHS).cut(document))
    assert len({w.length for w in found}) == 1
    assert found[0].length in LENGTHS
    assert all((w.document, w.split) == (3, document.split) and w.ids[0] == tokenizer.bos_token_id for w in found)
    joined = [i for w in found for i in w.ids[1:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < MIN_TOKENS
    if len(ids) <= max(LENGTHS):
        assert len(found) == 1
        assert found[0].text == document.text
    else:
        assert all(len(w.ids) - 1 == w.length for w in found[:-1])
        assert all(MIN_TOKENS <= len(w.ids) - 1 <= w.length for w in found)


def test_every_length_of_the_mix_is_used_and_a_text_keeps_its_own(tokenizer):
    windower = Windower(tokenizer, LENGTHS)
    texts = [long_text(60, seed) for seed in range(30)]
    found = [next(windower.cut(Document(i, text))).length for i, text in enumerate(texts)]
    assert set(found) == set(LENGTHS)
    assert found == [next(windower.cut(Document(99, text))).length for text in texts]


def test_chat_wraps_some_documents_whole_and_leaves_the_others_bare(tokenizer):
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    wrapped = 0
    for i in range(40):
        for found in Windower(tokenizer, LENGTHS, chat=True).cut(Document(i, long_text(60, i))):
            wrapped += user in found.ids
            assert found.ids[0] == tokenizer.bos_token_id
            assert list(found.ids).count(tokenizer.bos_token_id) == 1
            assert (found.ids[-1] == assistant) == (user in found.ids)
            assert found.text.strip() in tokenizer.decode(found.ids)
    assert 20 < wrapped < 200


def test_a_chat_is_rendered_once_with_its_special_tokens(tokenizer):
    ids = chat_ids(tokenizer, [{"role": "user", "content": "What is a star?"}])
    assert tokenizer.decode(ids) == "<bos><|user|>What is a star?<eos><|assistant|>"


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_what_the_tokenizer_puts_in_front(bos, eos):
    assert bos_ids(make_tokenizer(bos=bos, eos=eos)) == ([1] if bos else [])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_window_once_within_the_limit(lengths, limit):
    windows = [window(length, start=i) for i, length in enumerate(lengths)]
    found = list(batches(windows, tokens=limit))
    assert sorted(w.ids for batch in found for w in batch) == sorted(w.ids for w in windows)
    assert all(len(batch) == 1 or max(len(w.ids) for w in batch) * len(batch) <= limit for batch in found)
    assert all(batch for batch in found)


def test_padding_is_on_the_right_and_masked():
    ids, mask = pad([window(3, 5), window(1, 9)], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4))
def test_padded_rows_can_be_read_back(rows):
    ids, mask = pad_rows(rows)
    assert [one[its.bool()].tolist() for one, its in zip(ids, mask, strict=True)] == rows
    assert mask.sum(dim=1).tolist() == [len(row) for row in rows]
    assert all((one[len(row) :] == row[-1]).all() for one, row in zip(ids, rows, strict=True))


def test_a_text_alone_has_no_added_tokens(tokenizer):
    assert bos_ids(tokenizer) + text_ids(tokenizer, "a planet") == tokenizer("a planet")["input_ids"]

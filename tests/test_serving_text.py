"""Text as it comes, and tokens as they are drawn."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCABULARY, make_tokenizer
from saeguard.serving.sampling import Sampling, draw, nucleus, with_logprobs
from saeguard.serving.text import Detokenizer, StopStrings

TOKENIZER = make_tokenizer()
TEXTS = st.text(st.sampled_from("ab\u00e9\u20ac\U0001f980 "), max_size=12)


@given(
    st.one_of(st.lists(st.integers(0, VOCABULARY - 1), max_size=20), TEXTS.map(lambda text: TOKENIZER(text).input_ids))
)
def test_the_parts_are_the_whole(ids):
    detokenizer = Detokenizer(TOKENIZER)
    parts = [detokenizer.push(token) for token in ids]
    assert not any(part.endswith("\ufffd") for part in parts)
    whole = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(parts) + detokenizer.finish() == whole


def test_a_character_comes_when_its_last_byte_has() -> None:
    ids = TOKENIZER("\U0001f980", add_special_tokens=False).input_ids
    assert len(ids) == 4
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "\U0001f980"]


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow way: character by character, up to the first stop string that is complete, the longest of several."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_strings_are_found_wherever_the_parts_are_cut(parts, stops):
    filter_ = StopStrings(stops)
    out = ""
    for part in parts:
        out += filter_.push(part)
        assert cut("".join(parts), stops)[0].startswith(out)
        if filter_.stopped:
            break
    out += filter_.finish()
    assert (out, filter_.stopped) == cut("".join(parts), stops)


def test_drawing_follows_the_distribution() -> None:
    logits = torch.tensor([1.0, 2.0, float("-inf"), 0.5])
    sampling = Sampling(max_tokens=1, temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits, sampling, generator, {}) for _ in range(4000)])
    expected = torch.softmax(logits / 0.7, dim=0)
    assert torch.allclose(drawn.bincount(minlength=4) / 4000, expected, atol=0.03)
    assert not (drawn == 2).any()


def test_the_nucleus_is_the_fewest_tokens_that_reach_the_share() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(probabilities, 0.0).tolist() == [0, 0.5, 0, 0]
    assert nucleus(probabilities, 0.5).tolist() == [0, 0.5, 0, 0]
    assert nucleus(probabilities, 0.6).tolist() == [0, 0.5, 0, 0.25]
    assert (nucleus(probabilities, 1.0) > 0).all()


def test_penalties_lower_what_was_drawn() -> None:
    logits, generator = torch.tensor([1.0, 0.9]), torch.Generator()
    assert draw(logits, Sampling(1), generator, {0: 1}) == 0
    assert draw(logits, Sampling(1, presence_penalty=0.2), generator, {0: 1}) == 1
    assert draw(logits, Sampling(1, frequency_penalty=0.04), generator, {0: 2}) == 0
    assert draw(logits, Sampling(1, frequency_penalty=0.06), generator, {0: 2}) == 1


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    token = with_logprobs(2, logits, 2)
    expected = torch.log_softmax(logits, dim=0)
    assert token.logprob == float(expected[2])
    assert [i for i, _ in token.top] == [1, 2]
    assert with_logprobs(2, logits, 0).top == ()

"""Input normalisation: what it undoes, what it leaves, and that only detection sees it."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_guardrail, make_sae
from saeguard.attacks import spelling
from saeguard.gate import Gate, Mean, Probe
from tiny import hooks_on, same_verdicts

pytest.importorskip("confusable_homoglyphs")

from saeguard.normalise import Rereader, normalised

TEXT = "Which planet is closest to the Sun, and why?"
KNOWN = {word.strip(",?").lower() for word in TEXT.split()}
PLAIN = st.lists(st.text("abcdefghij", min_size=2, max_size=8), min_size=1, max_size=8).map(" ".join)


def count(word: str) -> int:
    """Tokens by a tokenizer that knows the words of the text, and letters."""
    bare = word.strip(",?")
    return 1 + len(word) - len(bare) if bare.lower() in KNOWN else len(word)


class TestText:
    @pytest.mark.parametrize("spell", [spelling.spaced, spelling.hyphenated, spelling.zero_width, spelling.homoglyphs])
    def test_it_undoes_what_it_says(self, spell):
        assert spell(TEXT) != TEXT
        assert normalised(spell(TEXT), count) == TEXT

    @pytest.mark.parametrize("spell", [spelling.rot13, spelling.in_base64, spelling.spaced_evenly, spelling.broken])
    def test_it_deciphers(self, spell):
        assert normalised(spell(TEXT), count).replace(", ", ",") == TEXT.replace(", ", ",")

    def test_it_undoes_unicode_forms(self):
        assert normalised("Ｊｕｐｉｔｅｒ ﬁnds 𝐦𝐨𝐨𝐧", count) == "Jupiter finds moon"

    @given(PLAIN)
    def test_ordinary_text_is_left_alone(self, text):
        assert normalised(text, count) == text

    @given(st.text(max_size=60))
    def test_nothing_invisible_is_left(self, text):
        assert not any(unicodedata.category(c) == "Cf" for c in normalised(text, count))

    def test_names_and_hyphens_stay(self):
        for text in ("A well-known X-ray, a T-shirt, I think.", "café, naïve, Ünïcode", TEXT):
            assert normalised(text, count) == text


@pytest.fixture(scope="module")
def guardrail(llama, tokenizer):
    """Triggers on the plain text and not on the same text with zero-width spaces."""
    for seed in range(20):
        gate = Gate(Probe(torch.randn(32, generator=torch.Generator().manual_seed(seed)), 0.0), Mean())
        found = make_guardrail(llama, tokenizer, make_sae("relu"), 2, gate=gate, threshold=1e9)
        with found.attach(llama, tokenizer) as guard:
            plain, odd = (guard.judge(ids(tokenizer, text))[0].statistic for text in (TEXT, spelling.zero_width(TEXT)))
        if plain > odd + 0.1:
            return replace(found, rules=(replace(found.rule, threshold=(plain + odd) / 2),))
    raise AssertionError("no probe reads the plain text higher")


def ids(tokenizer, text):
    return torch.tensor([tokenizer(text)["input_ids"]])


class TestGuard:
    def test_odd_spelling_triggers_and_the_model_reads_it_as_it_is(self, llama, tokenizer, guardrail):
        odd, hooks = ids(tokenizer, spelling.zero_width(TEXT)), hooks_on(llama)
        with torch.no_grad():
            bare = llama(odd).logits
            with guardrail.attach(llama, tokenizer) as guard:
                assert torch.equal(llama(odd).logits, bare)
                assert not guard.verdicts[0].triggered
            monitor = replace(guardrail, rules=(replace(guardrail.rule, action="monitor"),))
            with monitor.attach(llama, tokenizer, normalise=True) as guard:
                assert torch.equal(llama(odd).logits, bare)
                assert (guard.verdicts[0].triggered, guard.verdicts[0].first_token) == (True, 0)
            with guardrail.attach(llama, tokenizer, normalise=True):
                assert not torch.equal(llama(odd).logits, bare)
        assert hooks_on(llama) == hooks

    def test_plain_text_is_judged_as_without(self, llama, tokenizer, guardrail):
        with guardrail.attach(llama, tokenizer) as guard:
            expected = guard.judge(ids(tokenizer, TEXT))
        with guardrail.attach(llama, tokenizer, normalise=True) as guard:
            same_verdicts(guard.judge(ids(tokenizer, TEXT)), expected)

    def test_it_holds_in_a_batch_and_through_generation(self, llama, tokenizer, guardrail):
        rows = [ids(tokenizer, text)[0].tolist() for text in (spelling.zero_width(TEXT), "Bake the dough.")]
        width = max(map(len, rows))
        batch = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with guardrail.attach(llama, tokenizer) as guard:
            plain = guard.judge(batch, mask)[1].triggered
        with guardrail.attach(llama, tokenizer, normalise=True) as guard, torch.no_grad():
            llama.generate(batch, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)
            assert guard.verdicts[0].triggered
            assert guard.judge(batch, mask)[1].triggered == plain

    def test_nothing_odd_is_nothing_to_read_again(self, tokenizer):
        plain = ids(tokenizer, TEXT)
        assert Rereader(tokenizer)(plain, torch.ones_like(plain, dtype=torch.bool)) is None

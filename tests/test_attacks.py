"""Attacks on prompts: each is what it says, from text that was held out, and success is what its definition says."""

from __future__ import annotations

import base64
import json
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_server import serving
from conftest import make_guardrail, make_sae
from reference import attack_success
from saeguard.attacks import spelling, turns
from saeguard.attacks.attack import CLEAN, Prompt
from saeguard.attacks.catalogue import WHITE_BOX, every_name, lacking, prompt_attacks, wanted
from saeguard.attacks.config import FAMILIES, AttackConfig
from saeguard.attacks.materials import Materials
from saeguard.attacks.rewriting import remembered, with_synonyms
from saeguard.attacks.success import Blocked, Pair, outcome
from saeguard.attacks.task import GROUPS, Attacked, attacked
from saeguard.calibration import Rate
from saeguard.clamp import Clamp
from saeguard.corpus import Corpus
from saeguard.errors import EndpointError, UsageError
from saeguard.evaluation import task as sides
from saeguard.evaluation.catalogue import Sources
from saeguard.evaluation.endpoint import ChatEndpoint
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.mcq import PROMPT, Question
from saeguard.evaluation.prefix import BATCH_TOKENS, read_options
from saeguard.evaluation.sources import QuestionSet, TextSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import Record, split
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice, question_items
from saeguard.gate import Density, Gate
from saeguard.report.card_view import floored, legible, strong
from tiny import mixed_guardrail, same_verdicts, with_rule
from topics import passages

TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "Zs", "P")), min_size=1, max_size=80)
LENGTHS = (0, 50, 200)
QUESTION = Question("Which large planet moves round the sun?", ("Mars", "Jupiter", "Oxygen", "Bread"), 1)


def questions(topic: str, count: int) -> tuple[Question, ...]:
    """Distinct questions with four options, in the words of a topic."""
    texts = passages(topic, count, words=8)
    return tuple(Question(f"{text}?", tuple(text.split()[:4]), i % 4) for i, text in enumerate(texts))


SETS = (
    QuestionSet("topic", "topic", questions("forget", 30)),
    QuestionSet("kitchen", "near", questions("kitchen", 14)),
    QuestionSet("garden", "far", questions("garden", 14)),
)


@pytest.fixture(scope="module")
def materials(tokenizer) -> Materials:
    texts = (
        TextSet("garden", "far", Corpus.of("garden", "retain", passages("garden", 40, seed=3))),
        TextSet("kitchen", "near", Corpus.of("kitchen", "retain", passages("kitchen", 40, seed=3))),
    )
    return Materials.of(Sources(SETS, texts, frozenset({"garden"})), tokenizer)


@pytest.fixture(scope="module")
def every_attack(materials):
    return prompt_attacks(materials, AttackConfig(lengths=LENGTHS), Path())


@pytest.fixture(scope="module")
def subjects(llama, tokenizer) -> list[Subject]:
    """The tiny model without and with a guardrail that triggers on everything."""
    loader = Loader(lambda: (llama, tokenizer))
    clamp = Clamp("dense", c=40.0, strength=8.0)
    guardrail = make_guardrail(llama, tokenizer, make_sae("jumprelu"), 2, threshold=-1.0, clamp=clamp)
    return [Subject("unguarded", loader), Subject.guarded("guarded", loader, guardrail)]


class TestSpelling:
    @given(TEXT)
    def test_encodings_can_be_undone(self, text):
        assert spelling.rot13(spelling.rot13(text)) == text
        assert base64.b64decode(spelling.in_base64(text)).decode() == text

    @given(TEXT)
    def test_what_is_put_between_letters_can_be_taken_out(self, text):
        words = text.split()
        assert spelling.zero_width(text).replace(spelling.ZERO_WIDTH, "").split() == words
        assert ["".join(word.split(" ")) for word in spelling.spaced(text).split("   ")] == (words or [""])
        assert spelling.halved(text).replace("-", "").split() == [w for word in words if (w := word.replace("-", ""))]
        for spell in (spelling.broken, spelling.spaced_evenly):
            assert "".join(spell(text).split()) == "".join(words)
        assert spelling.hyphenated(text).split() == ["-".join(word) for word in words]

    @given(TEXT)
    def test_letters_are_replaced_one_by_one(self, text):
        for spell in (spelling.leetspeak, spelling.homoglyphs):
            assert len(spell(text)) == len(text)
            assert all(a == b for a, b in zip(spell(text), text, strict=True) if not a.isalnum())

    def test_homoglyphs_are_other_letters(self):
        spelled = spelling.homoglyphs("aceopxy")
        assert all(ord(letter) > 0x400 for letter in spelled)


class TestPrompts:
    def test_the_question_is_still_in_it(self, every_attack):
        inverse = {
            "spelling-rot13": spelling.rot13,
            "spelling-base64": lambda text: base64.b64decode(text).decode(),
            "spelling-capitals": str.capitalize,
        }
        for attack in every_attack:
            if attack.needs == "an endpoint" or attack.family in ("spelling", "splitting", "rewriting"):
                continue
            prompt = attack.change(QUESTION, random.Random(0))
            shown = prompt.text or prompt.turns[-1][1]
            assert QUESTION.text in shown, attack.name
        for attack in (one for one in every_attack if one.name in inverse):
            line = attack.change(QUESTION, random.Random(0)).text.split("\n")[1]
            assert inverse[attack.name](line.partition(": ")[2]).lower() == QUESTION.text.lower()

    def test_no_options_are_shown_and_no_answer_is_given_away(self, every_attack):
        for attack in every_attack:
            if attack.needs != "an endpoint" and attack.family != "spelling":
                prompt = attack.change(QUESTION, random.Random(0))
                assert "Jupiter" not in prompt.text + str(prompt.turns), attack.name

    def test_dilution_adds_as_many_tokens_as_it_says(self, every_attack, tokenizer):
        clean = len(CLEAN.change(QUESTION, random.Random(0)).ids(tokenizer))
        for attack in (one for one in every_attack if one.family == "dilution"):
            prompt = attack.change(QUESTION, random.Random(1))
            assert len(prompt.ids(tokenizer)) - clean == pytest.approx(attack.tokens, abs=12), attack.name
            at, asked = prompt.text.index(QUESTION.text), attack.name.split("-")[1]
            before, after = at, len(prompt.text) - at - len(QUESTION.text)
            if attack.tokens:
                assert (before > 35, after > 35) == (asked != "after", asked != "before"), attack.name

    def test_nothing_added_is_the_clean_form(self, every_attack):
        attack = next(one for one in every_attack if one.name == "dilution-both-ordinary-0")
        assert attack.change(QUESTION, random.Random(0)).text == PROMPT.format(question=QUESTION.text)

    def test_what_is_random_depends_on_seed_attack_and_item_alone(self, every_attack):
        attack = next(one for one in every_attack if one.name == "dilution-before-ordinary-50")
        items = question_items(SETS)[:4]
        first = attacked(attack, items, 0)
        assert attacked(attack, items[::-1], 0)[::-1] == first
        assert attacked(attack, items, 1) != first
        assert len({item.prompt.text for item in first}) == 4

    @given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 6))
    def test_pieces_put_together_are_the_question(self, words, count):
        found = turns.pieces(" ".join(words), count)
        assert " ".join(found).split() == words
        assert len(found) == min(count, len(words))

    def test_splitting_gives_the_question_over_the_turns(self, every_attack):
        for attack in (one for one in every_attack if one.family == "splitting"):
            prompt = attack.change(QUESTION, random.Random(0))
            said = " ".join(content for role, content in prompt.turns if role == "user")
            assert all(word in said for word in QUESTION.text.split()), attack.name
            assert [role for role, _ in prompt.turns] == ["user", "assistant"] * (len(prompt.turns) // 2) + ["user"]
            assert QUESTION.text not in said

    def test_formats_can_be_read_back(self, every_attack):
        odd = replace(QUESTION, text='Who said "Eppur si muove"; and why?')
        code = next(one for one in every_attack if one.name == "format-json").change(odd, random.Random(0)).text
        assert json.loads(code + ' ""}]}')["quiz"][0]["question"] == odd.text

    def test_synonyms_keep_capitals_and_everything_unknown(self):
        assert with_synonyms("Which Planet is called zorb?") == "What World is named zorb?"

    def test_a_model_without_chat_template_can_be_asked_too(self):
        from conftest import make_tokenizer

        bare = make_tokenizer(chat=False)
        ids = Prompt(turns=(("user", "a planet"), ("assistant", "Yes")), start="Answer:").ids(bare)
        assert bare.decode(ids, skip_special_tokens=True) == "a planet\nYes\nAnswer:"


class TestMaterials:
    def test_filler_is_held_out(self, materials):
        texts = passages("garden", 40, seed=3)
        documents = Corpus.of("garden", "retain", texts).documents()
        held_out = [document.text for document in documents if document.split == "test"]
        assert list(materials.passages["ordinary"]) == held_out
        assert len(materials.passages["near"]) == 40

    def test_examples_are_never_attacked(self, materials):
        _, test = split(question_items(SETS))
        asked = {item.content for item in test.items}
        shown = {q.text for its in materials.examples.values() for q in its}
        assert shown
        assert not shown & asked

    def test_filler_goes_on_where_there_is_little_text(self, materials, tokenizer):
        for kind in ("ordinary", "near", "neutral"):
            text = materials.filler(kind, 700, random.Random(0))
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == pytest.approx(700, rel=0.05)

    def test_what_is_missing_is_said(self, every_attack, tokenizer):
        bare = Materials(tokenizer)
        why = {attack.name: lacking(attack, bare, None) for attack in every_attack}
        assert why["dilution-before-ordinary-50"] == "it needs far texts"
        assert why["dilution-before-neutral-50"] is None
        assert why["few-shot-far-3"] == "it needs dev questions off the topic"
        assert why["paraphrase"] == "it needs a language model: --endpoint URL"


class TestNames:
    def test_every_family_has_attacks_and_every_name_is_one(self):
        names = every_name(AttackConfig())
        assert set(names.values()) == set(FAMILIES)
        assert set(WHITE_BOX) <= set(names)
        assert wanted(["all"], AttackConfig()) == set(names)
        assert wanted(["spelling", "lens"], AttackConfig()) >= {"spelling-rot13", "lens"}
        with pytest.raises(UsageError, match="no attack spelin"):
            wanted(["spelin"], AttackConfig())


class TestTask:
    def test_an_attack_that_changes_nothing_gives_the_records_of_eval(self, subjects):
        settings = Settings(split="all")
        task = Attacked("clean", tuple(attacked(CLEAN, question_items(SETS), 0)))
        (mine,) = evaluate(subjects, [task], settings)
        (theirs,) = evaluate(subjects, [MultipleChoice(SETS)], settings)
        for name in mine.records:
            found, expected = ({r.item: r for r in run.records[name]} for run in (mine, theirs))
            assert set(found) == set(expected)
            for item, record in expected.items():
                assert found[item].scores["accuracy"] == record.scores["accuracy"]
                assert found[item].triggered == record.triggered
        assert isinstance(evaluate(subjects[:1], [task], Settings())[0].side, sides.Test)

    def test_batches_are_bounded_and_whole(self, materials, every_attack, tokenizer):
        long = next(one for one in every_attack if one.name == "dilution-before-ordinary-200")
        items = attacked(long, question_items(SETS), 0)
        batches = Attacked("long", tuple(items)).batches(tokenizer, items)
        assert sorted(item.id for batch in batches for item in batch) == sorted(item.id for item in items)
        for batch in batches:
            longest = max(len(item.prompt.ids(tokenizer)) for item in batch)
            assert len(batch) == 1 or 4 * len(batch) * longest <= BATCH_TOKENS

    @pytest.mark.parametrize("name", ["dilution-before-ordinary-200", "dilution-both-ordinary-200", "few-shot-far-3"])
    def test_what_is_read_once_gives_the_same_answers_and_verdicts(self, subjects, every_attack, tokenizer, name):
        attack = next(one for one in every_attack if one.name == name)
        runs = []
        for share in (False, True):
            items = tuple(attacked(attack, question_items(SETS), 0, share=share))
            runs += evaluate(subjects, [Attacked(name, items)], Settings(split="all", keep_text=True))
        alone, shared = runs
        assert len(Attacked(name, items).batches(tokenizer, items)) == GROUPS
        for subject in alone.records:
            found, expected = ({r.item: r for r in run.records[subject]} for run in (shared, alone))
            assert set(found) == set(expected)
            for item, record in expected.items():
                assert found[item].texts == record.texts
                assert found[item].triggered == record.triggered
                assert (found[item].statistic or 0.0) == pytest.approx(record.statistic or 0.0, rel=1e-4)
                assert found[item].scores.get("read_before") == record.scores.get("read_before")

    @pytest.mark.parametrize("how", ["unguarded", "all", "onward"])
    def test_options_after_a_beginning_that_is_read_once_score_the_same(self, llama, tokenizer, monkeypatch, how):
        draw = random.Random(0)
        beginning, *rests = ([draw.randrange(6, 320) for _ in range(n)] for n in (30, 5, 9, 1, 7, 12, 3))
        prompts = [beginning + rest for rest in rests]
        branches = [[[draw.randrange(6, 320) for _ in range(n)] for n in (1, 5)] for _ in rests]
        monkeypatch.setattr("saeguard.evaluation.prefix.BATCH_TOKENS", 200)
        unguarded = read_options(llama, prompts, branches, None)
        guarding = nullcontext()
        if how != "unguarded":
            rows = [torch.tensor([row]) for row in prompts]
            guardrail = mixed_guardrail(llama, tokenizer, make_sae("jumprelu"), rows)
            guarding = with_rule(guardrail, reach=how).attach(llama, tokenizer)
        with guarding as guard:
            alone = read_options(llama, prompts, branches, guard)
            shared = read_options(llama, prompts, branches, guard, share=True)
        for one, other in zip(alone, shared, strict=True):
            torch.testing.assert_close(one.log_probabilities, other.log_probabilities, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.later, other.later, rtol=1e-4, atol=1e-4)
        if how == "unguarded":
            return
        same_verdicts([one.verdict for one in shared], [one.verdict for one in alone])
        first = [one.verdict.first_token for one in shared]
        assert None in first
        assert max(at or 0 for at in first) >= len(beginning)
        for at, bare, one in zip(first, unguarded, shared, strict=True):
            same = torch.allclose(one.log_probabilities, bare.log_probabilities, rtol=1e-4, atol=1e-4)
            assert same == (at is None)

    def test_what_judges_whole_prompts_says_so(self, subjects):
        guarded = subjects[1].guardrail
        at_once = replace(guarded.rule, gate=Gate(Density(), moment="block"))
        loader = subjects[1].loader
        assert not subjects[1].whole_prompts
        assert Subject.guarded("normalised", loader, guarded, normalise=True).whole_prompts
        assert Subject.guarded("as the paper", loader, replace(guarded, rules=(guarded.rule, at_once))).whole_prompts

    def test_a_conversation_read_turn_by_turn_gives_the_same_verdict(self, every_attack, llama, tokenizer, subjects):
        prompt = next(one for one in every_attack if one.name == "split-3").change(QUESTION, random.Random(0))
        ids = torch.tensor([prompt.ids(tokenizer)])
        guardrail = subjects[1].guardrail
        with guardrail.attach(llama, tokenizer) as guard, torch.inference_mode():
            whole = guard.judge(ids)[0]
            cache = None
            for part in torch.tensor_split(ids, 3, dim=1):
                cache = llama(part, past_key_values=cache, use_cache=True).past_key_values
            turned = guard.verdicts[0]
        assert (turned.triggered, turned.first_token) == (whole.triggered, whole.first_token)
        assert turned.statistic == pytest.approx(whole.statistic)


def record(item: int, role: str, draw: random.Random) -> Record:
    """A record with everything that an attack's records have."""
    scores = {"accuracy": float(draw.random() < 0.6), "chosen": float(draw.randrange(4)), "tokens": 10.0,
              "chance": draw.choice((0.25, 0.5)), "seconds": 0.5, "search_seconds": 0.0, "calls": 0.0}  # fmt: skip
    return Record(str(item), role, role, scores, draw.random() < 0.5, draw.random())


def scored(accuracy: float, item: int = 0) -> Record:
    """A record of a question on the topic that was right or wrong."""
    one = record(item, "topic", random.Random(0))
    return replace(one, scores={**one.scores, "accuracy": accuracy})


class TestSuccess:
    @pytest.mark.parametrize("seed", range(8))
    def test_it_is_what_the_definition_says(self, seed):
        draw = random.Random(seed)
        roles = ["topic"] * 20 + ["near"] * 4 + ["far"] * 6
        clean = Pair.of(*([record(i, role, draw) for i, role in enumerate(roles)] for _ in range(2)))
        some = [(i, role) for i, role in enumerate(roles) if draw.random() < 0.7]
        attack = Pair.of(*([record(i, role, draw) for i, role in some] for _ in range(2)))
        without = {str(i): record(i, role, draw) for i, role in enumerate(roles) if role == "topic"}
        blocked = Blocked.of(clean, without)
        found = outcome(blocked.blocked, clean, attack)
        counts, success = attack_success(clean, without, attack)
        assert {**blocked.counts(), "tried": found["tried"], "n": found["n"]} == counts
        assert found["blocked"] == counts["blocked"]
        assert (found["success"] is None) == (success is None)
        if success is not None:
            assert found["success"]["value"] == pytest.approx(success)
            assert (found["success"]["low"], found["success"]["high"]) == Rate(
                round(success * counts["n"]), counts["n"]
            ).interval
            for part, raw in found["success"].items():
                expected = raw if part == "n" else (raw - found["chance"]) / (1 - found["chance"])
                assert found["above_chance"][part] == pytest.approx(expected)

    @pytest.mark.parametrize(("without", "blocked", "left_out"), [(0.0, ("0",), ()), (1.0, (), ("0",))])
    def test_what_the_options_give_away_is_not_attacked(self, without, blocked, left_out):
        found = Blocked.of(Pair.of([scored(1.0)], [scored(0.0)]), {"0": scored(without)})
        assert (found.blocked, found.left_out) == (blocked, left_out)
        assert found.counts() == {"right": 1, "known": len(blocked), "blocked": len(blocked), "left_out": len(left_out)}

    @pytest.mark.parametrize(("hits", "expected"), [(0, -1 / 3), (1, 0.0), (4, 1.0)])
    def test_a_blind_choice_is_no_success_above_chance_and_all_is_all(self, hits, expected):
        right, wrong = ([replace(scored(accuracy, i), scores={**scored(accuracy).scores, "chance": 0.25})
                         for i in range(4)] for accuracy in (1.0, 0.0))  # fmt: skip
        found = outcome([*"0123"], Pair.of(right, wrong), Pair.of(right, [*right[:hits], *wrong[hits:]]))
        assert (found["success"]["value"], found["success"]["n"]) == (hits / 4, 4)
        assert found["above_chance"]["value"] == pytest.approx(expected)
        assert floored(found["above_chance"])["value"] == pytest.approx(max(0.0, expected))

    @pytest.mark.parametrize(
        ("asked", "hits", "is_legible", "coloured"),
        [(30, 30, True, True), (30, 8, True, False), (9, 9, False, False), (0, 0, False, False)],
    )
    def test_only_what_the_model_reads_and_lies_above_a_blind_choice_is_coloured(
        self, asked, hits, is_legible, coloured
    ):
        right, wrong = ([replace(scored(accuracy, i), scores={**scored(accuracy).scores, "chance": 0.25})
                         for i in range(30)] for accuracy in (1.0, 0.0))  # fmt: skip
        attack = Pair.of([*right[:asked], *wrong[asked:]], [*right[:hits], *wrong[hits:]])
        found = outcome([str(i) for i in range(30)], Pair.of(right, wrong), attack)
        assert (legible(found), strong(found)) == (is_legible, coloured)

    def test_nothing_asked_is_no_figure(self):
        right, wrong = [scored(1.0)], [scored(0.0)]
        found = outcome(["0"], Pair.of(right, wrong), Pair.of(wrong, wrong))
        assert (found["n"], found["success"], found["chance"], found["kept"]["rate"]) == (0, None, None, 0.0)
        assert found["above_chance"] is None


class TestEndpoint:
    def test_each_question_is_asked_once_and_kept(self, materials, tmp_path):
        with serving() as server:
            endpoint = ChatEndpoint(server.url, "small", "secret")
            for _ in range(2):
                its = prompt_attacks(materials, AttackConfig(languages=("Latin",)), tmp_path, endpoint=endpoint)
                latin = next(one for one in its if one.name == "translation-latin")
                found = [latin.change(QUESTION, random.Random(i)) for i in range(2)]
            assert len(server.asked) == 1
            assert (server.keys, "Latin" in server.asked[0]["messages"][0]["content"]) == (["Bearer secret"], True)
        assert found[0] == found[1]
        assert (found[0].calls, QUESTION.text in found[0].text) == (1, True)

    def test_a_line_that_was_cut_off_is_asked_again(self, tmp_path):
        asked = []
        change = lambda question, draw: asked.append(1) or Prompt(question.text, calls=1)  # noqa: E731
        path = tmp_path / "kept.jsonl"
        assert remembered(change, path, "a")(QUESTION, random.Random(0)).text == QUESTION.text
        assert remembered(change, path, "a")(QUESTION, random.Random(0)).calls == 1
        assert len(asked) == 1
        remembered(change, path, "b")(QUESTION, random.Random(0))
        assert len(asked) == 2
        path.write_text(path.read_text("utf-8")[:-20], "utf-8")
        remembered(change, path, "b")(QUESTION, random.Random(0))
        assert len(asked) == 3
        assert len(path.read_text("utf-8").splitlines()) == 2

    def test_an_endpoint_that_fails_is_named(self, materials, tmp_path):
        its = prompt_attacks(materials, AttackConfig(), tmp_path, endpoint=ChatEndpoint("http://127.0.0.1:9/v1", "m"))
        paraphrase = next(one for one in its if one.name == "paraphrase")
        with pytest.raises(EndpointError, match="cannot be reached"):
            paraphrase.change(QUESTION, random.Random(0))
        with serving() as server:
            server.raw = b'{"choices": [{"message": {"content": "  "}}]}'
            its = prompt_attacks(materials, AttackConfig(), tmp_path, endpoint=ChatEndpoint(server.url, "m"))
            with pytest.raises(EndpointError, match="empty answer"):
                next(one for one in its if one.name == "paraphrase").change(QUESTION, random.Random(0))

"""Relearning: lessons are what they say, stages lead to the same digits as one run, curves are asked and drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import make_guardrail, make_model, make_sae
from saeguard import errors, fit
from saeguard.attacks.config import AttackConfig
from saeguard.attacks.curves import Relearner
from saeguard.attacks.finetuning import Course, _Rows
from saeguard.attacks.relearning import RELEARNING, Lesson
from saeguard.baselines.weight_settings import Training
from saeguard.clamp import Clamp
from saeguard.cli.main import main
from saeguard.corpus import Corpus
from saeguard.evaluation.mcq import Question, answer_questions
from saeguard.evaluation.sources import QuestionSet, TextSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.tasks.multiple_choice import question_items
from tiny import hooks_on
from topics import LAYER, SMALL, corpora, passages

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]
FORGET, RETAIN = corpora()
ROLES = {"forget": "topic", "kitchen": "near", "garden": "far"}
TEXTS = tuple(TextSet(n, ROLES[n], Corpus.of(n, "retain", its)) for n, its in {"forget": FORGET, **RETAIN}.items())
SETTINGS = Training(1e-3, batch=4, max_tokens=24, keep_utility=0.0)
CONFIG = AttackConfig(epochs=(1, 3), documents=8, batch=4, max_tokens=24, learning_rate=1e-3)


def items_of(*texts: str):
    """Questions whose text is as given."""
    return question_items([QuestionSet("q", "topic", tuple(Question(text, ("a", "b"), 0) for text in texts))])


ITEMS = items_of("what is zorb?")


@pytest.fixture
def loader(tokenizer) -> Loader:
    model = make_model("llama")
    return Loader(lambda: (model, tokenizer))


@pytest.fixture
def lesson() -> Lesson:
    return Lesson.taken("forget", TEXTS, 8)


@pytest.fixture
def course(loader, lesson, tokenizer, tmp_path) -> Course:
    return Course(loader, lesson.windows(tokenizer, 24), SETTINGS, tmp_path / "work")


def weights(loader: Loader) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in loader.loaded[0].named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


class TestLesson:
    @pytest.mark.parametrize(("text", "role"), [("forget", "topic"), ("related", "near"), ("unrelated", "far")])
    def test_it_is_of_the_fit_split_of_its_role(self, text, role):
        lesson = Lesson.taken(text, TEXTS, 8)
        (name,) = (each.name for each in TEXTS if each.role == role)
        its = lesson.documents[name]
        assert (len(its), {one.split for one in its}) == (8, {"fit"})
        about = lesson.checked(TEXTS, ITEMS)
        assert about["corpora"] == {name: {"documents": 8, "corpus": about["corpora"][name]["corpus"]}}
        assert about["questions_compared"] == 1

    @pytest.mark.parametrize("split", ["calibration", "test"])
    def test_documents_of_another_split_are_refused(self, split):
        other = [one for one in TEXTS[0].corpus.documents() if one.split == split]
        with pytest.raises(errors.EvaluationError, match="of the fit split of forget"):
            Lesson("forget", {"forget": other[:2]}).checked(TEXTS, ITEMS)

    def test_text_on_the_topic_is_not_unrelated(self):
        false = TextSet("garden", "far", Corpus.of("garden", "retain", FORGET))
        with pytest.raises(errors.EvaluationError, match="text off the topic"):
            Lesson.taken("unrelated", (TEXTS[0], false), 8).checked((TEXTS[0], false), ITEMS)

    def test_questions_in_the_text_are_refused(self, lesson):
        with pytest.raises(errors.EvaluationError, match="1 of the attacked questions stand in the text"):
            lesson.checked(TEXTS, items_of(lesson.texts[3], "what is zorb?"))

    def test_a_row_of_another_text_is_not_learned_from(self, lesson, tokenizer, llama):
        rows = _Rows(frozenset(window.ids for window in lesson.windows(tokenizer, 24)))
        ids = tokenizer("knead the dough", return_tensors="pt")["input_ids"]
        pair = {"forget": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        with pytest.raises(errors.EvaluationError, match="no window of the lesson"):
            rows(llama, lambda: None, pair)

    def test_what_is_lacking_is_said(self):
        assert "--far-text" in RELEARNING["relearn-unrelated"].lacks(TEXTS[:2], guarded=True)
        assert "--guardrail" in RELEARNING["relearn-forget-hooked"].lacks(TEXTS, guarded=False)
        assert RELEARNING["relearn-related-lora"].lacks(TEXTS, guarded=False) is None


class TestCourse:
    def test_stages_lead_to_the_digits_of_one(self, course, tmp_path):
        before = weights(course.loader)
        staged = [weights(course.after(epochs)) for epochs in (1, 3)]
        whole = weights(replace(course, work=tmp_path / "other").after(3))
        assert same(staged[1], whole)
        assert not same(staged[0], whole)
        assert not same(staged[0], before)
        assert same(weights(course.loader), before)

    def test_a_killed_stage_goes_on_to_the_same_digits(self, course, tmp_path, monkeypatch):
        whole = weights(replace(course, work=tmp_path / "other").after(3))
        compute, calls = _Rows.__call__, []

        def stopped(self, *args):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return compute(self, *args)

        monkeypatch.setattr("saeguard.attacks.finetuning.CHECK_EVERY", 2)
        monkeypatch.setattr(_Rows, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            course.after(3)
        seen = []
        monkeypatch.setattr(_Rows, "__call__", lambda self, *args: seen.append(1) or compute(self, *args))
        assert same(weights(course.after(3)), whole)
        assert len(seen) == course.steps(3) - 4

    def test_what_is_trained_is_not_trained_again(self, course, monkeypatch):
        found = weights(course.after(1))
        monkeypatch.setattr(_Rows, "__call__", None)
        assert same(weights(course.after(1)), found)

    def test_the_text_becomes_likelier(self, course, lesson):
        def nll(loader: Loader) -> float:
            model, tokenizer = loader.loaded
            ids = tokenizer(lesson.texts[0], return_tensors="pt")["input_ids"][:, :24]
            with torch.no_grad():
                return float(model(input_ids=ids, labels=ids).loss)

        assert nll(course.after(3)) < nll(course.loader) - 0.1

    def test_adapters_are_trained_and_put_on_the_model(self, course):
        before = weights(course.loader)
        after = weights(replace(course, settings=replace(SETTINGS, lora_rank=2)).after(1))
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert changed
        assert all("proj" in name for name in changed)

    def test_under_the_hook_other_weights_are_learned(self, course, loader, tokenizer):
        model = loader.loaded[0]
        guardrail = make_guardrail(model, tokenizer, make_sae("jumprelu"), 1, threshold=-1.0, action="clamp")
        subject = Subject.guarded("mine", loader, guardrail)
        relearner = Relearner(CONFIG, TEXTS, course.work, lambda _: make_sae("jumprelu"))
        found = {}
        for name in ("relearn-forget", "relearn-forget-hooked"):
            lesson, _ = relearner.lesson(RELEARNING[name], ITEMS)
            (point,) = relearner.points(RELEARNING[name], subject, lesson, 1)
            found[name] = weights(point.models[0].loader)
            assert "weights of the model: found" in point.note
        assert not same(*found.values())
        assert hooks_on(model) == 0


def test_refit_is_of_the_trained_model(loader, tokenizer, tmp_path):
    sae = make_sae("jumprelu")
    guardrail = fit(*loader.loaded, sae, layer=LAYER, forget=FORGET, retain=RETAIN, config=SMALL)
    relearner = Relearner(replace(CONFIG, refit=("threshold", "whole")), TEXTS, tmp_path, lambda _: sae)
    subject = Subject.guarded("mine", loader, guardrail)
    attack = RELEARNING["relearn-unrelated"]
    lesson, _ = relearner.lesson(attack, ITEMS)
    said = relearner.needs(attack, [subject], lesson)
    windows = lesson.windows(tokenizer, CONFIG.max_tokens)
    assert f"8 documents as {len(windows)} windows" in said
    assert f"for each of mine {3 * -(-len(windows) // CONFIG.batch)} steps" in said
    points = list(relearner.points(attack, subject, lesson, 1))
    assert [point.about["refit"] for point in points] == [None, "threshold", "whole"]
    for point in points[1:]:
        again = point.models[1].guardrail
        again.check(*point.models[0].loader.loaded)
        assert set(point.about["drift"]) == {"forget", "kitchen", "garden"}
    assert points[1].models[1].guardrail.features == guardrail.features
    with pytest.raises(errors.UsageError, match="has not: garden"):
        replace(relearner, texts=TEXTS[:2]).needs(attack, [subject], lesson)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer) -> Path:
    """Model, another of its kind, texts, questions that it answers right, and a guardrail that acts on all."""
    folder = tmp_path_factory.mktemp("relearning")
    for name, model in (("model", llama), ("other", make_model("llama", seed=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    clamp = Clamp("dense", c=60.0, strength=8.0)
    make_guardrail(llama, tokenizer, make_sae("jumprelu"), 1, threshold=0.05, clamp=clamp).save_pretrained(
        folder / "guard"
    )
    for name in ROLES:
        asked = [Question(f"{t}?", tuple(t.split()[:4]), 0) for t in passages(name, 30, words=8, seed=9)]
        answers = answer_questions(llama, tokenizer, asked)
        rows = [
            {"question": q.text, "choices": q.choices, "answer": a.chosen} for q, a in zip(asked, answers, strict=True)
        ]
        (folder / f"{name}-q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        its = [json.dumps({"text": text}) + "\n" for text in passages(name, 20)]
        (folder / f"{name}.jsonl").write_text("".join(its), "utf-8")
    return folder


@pytest.fixture
def run(folder, capsys, tmp_path):
    def run(*words: object, roles=ROLES):
        its = [w for name, role in ROLES.items() for w in (f"--{role}", f"{name}={folder / name}-q.jsonl")]
        its += [w for name, role in roles.items() for w in (f"--{role}-text", f"{name}={folder / name}.jsonl")]
        its += ["--model", folder / "model", "--dtype", "float32", "--device", "cpu", "--limit", 12, "--others", 2]
        its += ["--documents", 2, "--batch", 8, "--max-tokens", 64, "--out", tmp_path / "card.json"]
        status = main(["attack", *map(str, [*words, *its])])
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in words and out else out, err

    return run


def test_curves_of_a_guardrail_and_a_checkpoint_stand_side_by_side(run, folder, tmp_path):
    both = ("--guardrail", f"mine={folder / 'guard'}", "--checkpoint", f"other={folder / 'other'}")
    status, card, err = run("relearn-forget", *both, "--epochs", 1, 2, "--json")
    assert status == 0, err
    assert "relearn-forget: 2 documents as" in err
    points = [(point["subject"], point["epochs"]) for point in card["curves"]]
    assert points == [(name, epochs) for name in ("mine", "other") for epochs in (0, 1, 2)]
    assert [point["guarded"] is None for point in card["curves"]] == [False] * 3 + [True] * 3
    assert card["curves"][2]["cost"]["steps"] == 2 * card["curves"][1]["cost"]["steps"] > 1
    clean = {(row["subject"], row["role"]): row["accuracy"] for row in card["clean"]}
    for point in card["curves"]:
        judged = point["guarded"] or point["model"]
        assert judged["topic"]["right"]["n"] == clean["unguarded", "topic"]["n"]
        if point["epochs"] == 0:
            assert judged["topic"]["right"] == clean[point["subject"], "topic"]
    rows = {(row["subject"], row["attack"]): row for row in card["rows"]}
    assert set(rows) == {(s, f"relearn-forget-epoch-{e}") for s in ("mine", "other") for e in (1, 2)}
    assert rows["other", "relearn-forget-epoch-1"]["n"] == rows["other", "relearn-forget-epoch-1"]["blocked"]
    text = (tmp_path / "card.md").read_text("utf-8")
    assert text.count("| relearn-forget |") == 6
    assert "relearn-forget trains on 2 documents of forget text, of the fit split of forget (2)" in text
    page = (tmp_path / "card.html").read_text("utf-8")
    assert "against epochs, of every subject" in page
    assert run("--render", tmp_path / "card.json")[0] == 0
    assert (tmp_path / "card.html").read_text("utf-8") == page


def test_without_being_named_it_is_not_made(run, folder):
    status, card, _ = run("all", "--guardrail", folder / "guard", "--minutes", 0, "--json")
    why = {one["attack"]: one["why"] for one in card["left_out"]}
    assert (status, card["curves"]) == (0, [])
    assert why["relearn-forget"] == "it trains the model, which takes long: saeguard attack relearning, or its name"


@pytest.mark.parametrize(
    ("words", "roles", "status", "message"),
    [
        (["relearn-forget"], {}, 2, "it needs topic texts: --topic-text NAME=FILE"),
        (["relearn-forget", "--epochs", "0"], ROLES, 2, "--epochs: expected numbers from 1 on"),
        (["relearn-forget", "--refit", "whole"], ROLES, 2, "does not say which texts it was fitted on"),
        (["relearn-forget-hooked"], ROLES, 2, "it needs a guardrail: --guardrail DIR"),
    ],
)
def test_mistakes_are_named(run, folder, words, roles, status, message):
    given = ("--checkpoint", f"c={folder / 'other'}") if "hooked" in words[0] else ("--guardrail", folder / "guard")
    found, _, err = run(*words, *given, roles=roles)
    assert (found, message in err, "Traceback" in err) == (status, True, False), err

"""The harness: the same items for all, figures from records, work that goes on, no change without a trigger."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from conftest import make_guardrail, make_model, make_sae
from saeguard.corpus import Corpus
from saeguard.errors import EvaluationError
from saeguard.evaluation import task as sides
from saeguard.evaluation.catalogue import held_out
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.mcq import Question, right_in_all_orders
from saeguard.evaluation.result import make_result, read_result, scores_of, write_result
from saeguard.evaluation.sources import QuestionSet, TextSet
from saeguard.evaluation.subject import Loader, Subject, checkpoint
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice, question_items
from saeguard.evaluation.tasks.open import OpenAnswers
from saeguard.evaluation.tasks.perplexity import Perplexity
from saeguard.generate import REFUSAL
from saeguard.online.intervention import attach
from topics import corpora, passages

EVERY = Settings(split="all")


@dataclass(frozen=True)
class KitchenFilter(MultipleChoice):
    """Keeps the questions about the kitchen."""

    name: str = "filter"

    def run(self, it, batch, seed):
        return [replace(r, scores={"kept": float(r.domain == "kitchen")}) for r in super().run(it, batch, seed)]


@dataclass(frozen=True)
class OnlyTheKitchen(MultipleChoice):
    """Has that filter."""

    @property
    def filter(self):
        return KitchenFilter(self.sets)


def questions(topic: str, count: int) -> tuple[Question, ...]:
    """Distinct questions with four options, in the words of a topic."""
    texts = passages(topic, count, words=8)
    return tuple(Question(f"{text}?", tuple(text.split()[:4]), i % 4) for i, text in enumerate(texts))


SETS = (
    QuestionSet("topic", "topic", questions("forget", 20)),
    QuestionSet("kitchen", "near", questions("kitchen", 14)),
    QuestionSet("garden", "far", questions("garden", 14)),
)


@pytest.fixture(scope="module")
def loader(llama, tokenizer):
    return Loader(lambda: (llama, tokenizer))


@pytest.fixture(scope="module")
def guarded(llama, tokenizer, loader):
    """A guardrail that triggers on some items and not on others."""
    guardrail = make_guardrail(llama, tokenizer, make_sae("jumprelu"), 2)
    with guardrail.attach(llama, tokenizer) as guard:
        statistics = []
        for text in [*passages("forget", 20), *passages("kitchen", 20), *passages("garden", 20)]:
            statistics.append(guard.judge(tokenizer(text, return_tensors="pt")["input_ids"])[0].statistic)
    rule = replace(guardrail.rule, threshold=sorted(statistics)[30])
    return Subject.guarded("guarded", loader, replace(guardrail, rules=(rule,)))


@pytest.fixture(scope="module")
def subjects(loader, guarded):
    return [Subject("unguarded", loader), guarded]


def texts() -> tuple[TextSet, ...]:
    forget, retain = corpora(12)
    sets = [TextSet("topic", "topic", Corpus.of("topic", "retain", forget))]
    return (*sets, *(TextSet(name, "far", Corpus.of(name, "retain", its)) for name, its in retain.items()))


class TestSplits:
    def test_every_item_is_on_one_side_and_always_the_same(self):
        items = question_items(SETS)
        dev, test = sides.split(items)
        assert isinstance(dev, sides.Dev)
        assert isinstance(test, sides.Test)
        ids = {item.id for item in items}
        assert {item.id for item in dev.items} | {item.id for item in test.items} == ids
        assert not {item.id for item in dev.items} & {item.id for item in test.items}
        again, _ = sides.split(items[::-1])
        assert {item.id for item in again.items} == {item.id for item in dev.items}

    def test_about_three_tenths_are_for_choosing(self):
        dev, _ = sides.split(question_items([QuestionSet("x", "far", questions("garden", 400))]))
        assert 0.2 < len(dev.items) / 400 < 0.4

    def test_runs_carry_their_side(self, subjects):
        for side, kind in (("dev", sides.Dev), ("test", sides.Test)):
            (run,) = evaluate(subjects[:1], [MultipleChoice(SETS)], Settings(split=side))
            assert isinstance(run.side, kind)

    def test_repeated_items_count_once(self, subjects):
        twice = (replace(SETS[0], questions=SETS[0].questions * 2),)
        (run,) = evaluate(subjects[:1], [MultipleChoice(twice)], EVERY)
        assert (len(run.items), run.repeated) == (20, 20)

    def test_a_limit_takes_the_same_items_of_each_domain(self, subjects):
        (run,) = evaluate(subjects[:1], [MultipleChoice(SETS)], replace(EVERY, limit=5))
        assert [sum(item.domain == each.name for item in run.items) for each in SETS] == [5, 5, 5]
        (more,) = evaluate(subjects[:1], [MultipleChoice(SETS)], replace(EVERY, limit=9))
        assert {item.id for item in run.items} < {item.id for item in more.items}


class TestRuns:
    def test_all_subjects_get_the_same_items(self, subjects):
        for run in evaluate(subjects, [MultipleChoice(SETS), OpenAnswers(SETS, 4)], EVERY):
            plain, guarded = ({record.item for record in its} for its in run.records.values())
            assert plain == guarded == {item.id for item in run.items}

    def test_the_same_seed_gives_the_same_result(self, subjects):
        tasks = [MultipleChoice(SETS), OpenAnswers(SETS, 4), Perplexity(texts())]
        first, second = (make_result(subjects, evaluate(subjects, tasks, EVERY), EVERY, {}) for _ in range(2))
        assert json.dumps(first) == json.dumps(second)

    def test_what_does_not_trigger_keeps_every_bit(self, subjects):
        (run,) = evaluate(subjects, [Perplexity(texts())], EVERY)
        passed = [record for record in run.records["guarded"] if not record.triggered]
        caught = [record for record in run.records["guarded"] if record.triggered]
        before = {record.item: record.scores["nats"] for record in run.records["unguarded"]}
        assert passed
        assert caught
        assert all(r.scores["kl_untriggered"] == 0 and r.scores["changed"] == 0 for r in passed)
        assert all(r.scores["nats"] == before[r.item] for r in passed)
        assert any(r.scores["kl_triggered"] > 0 for r in caught)

    def test_perplexity_is_that_of_a_text_alone(self, subjects, llama, tokenizer):
        (run,) = evaluate(subjects[:1], [Perplexity(texts(), max_tokens=20)], EVERY)
        items = {item.id: item for item in run.items}
        for record in run.records["unguarded"][:5]:
            ids = tokenizer(items[record.item].text, return_tensors="pt")["input_ids"][:, :20]
            with torch.inference_mode():
                loss = float(llama(ids, labels=ids).loss) * (ids.shape[1] - 1)
            assert record.scores["nats"] == pytest.approx(loss, rel=1e-4)
            assert record.scores["tokens"] == ids.shape[1] - 1

    def test_texts_that_were_fitted_on_are_judged_on_their_test_split(self, guarded):
        sets = texts()
        fitted = replace(guarded.guardrail.rule, evidence={"corpora": {
            "forget": {"fingerprint": sets[0].corpus.summary().fingerprint}
        }})  # fmt: skip
        names = held_out([replace(guarded.guardrail, rules=(fitted,))], sets)
        assert names == {"topic"}
        items = Perplexity(sets, names).items()
        assert [sum(item.domain == each.name for item in items) for each in sets] == [2, 12, 12]

    def test_the_papers_protocol_tries_all_orders_on_the_unguarded_model(self, subjects, llama, tokenizer):
        task = MultipleChoice(SETS, form="letters", protocol="paper")
        (run,) = evaluate(subjects, [task.filter], replace(EVERY, limit=4))
        kept = {item.id: right_in_all_orders(llama, tokenizer, item.question) for item in run.items}
        for records in run.records.values():
            assert {record.item: bool(record.scores["kept"]) for record in records} == kept

    def test_only_the_items_that_the_filter_keeps_are_judged(self, subjects):
        (run,) = evaluate(subjects, [OnlyTheKitchen(SETS)], EVERY)
        assert {item.domain for item in run.items} == {"kitchen"}
        assert run.filtered == 34
        assert all(record.domain == "kitchen" for records in run.records.values() for record in records)

    def test_a_rule_that_refuses_answers_with_the_refusal(self, loader, guarded):
        rule = replace(guarded.guardrail.rule, action="refuse", threshold=-1.0)
        refusing = Subject.guarded("refusing", loader, replace(guarded.guardrail, rules=(rule,)))
        (run,) = evaluate([refusing], [OpenAnswers(SETS[:1], 4)], replace(EVERY, keep_text=True, limit=4))
        assert {record.texts["answer"] for record in run.records["refusing"]} == {REFUSAL}
        assert all(record.scores["refusal"] for record in run.records["refusing"])

    def test_any_context_can_be_judged(self, loader, guarded):
        wrapped = Subject("wrapped", loader, lambda model, tokenizer: attach(guarded.guardrail, model, tokenizer))
        records = [evaluate([one], [MultipleChoice(SETS)], EVERY)[0].records[one.name] for one in (wrapped, guarded)]
        assert records[0] == records[1]

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_an_adapter_is_put_on_a_copy_of_the_model(self, subjects, llama, tokenizer, tmp_path):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
        loader = checkpoint(str(tmp_path), lambda: (make_model("llama"), tokenizer), device="cpu", dtype="float32")
        (run,) = evaluate([subjects[0], Subject("tuned", loader)], [Perplexity(texts())], EVERY)
        plain, tuned = ([record.scores["nats"] for record in its] for its in run.records.values())
        assert plain != tuned

    def test_no_items_and_two_names_are_refused(self, subjects):
        with pytest.raises(EvaluationError, match="no items left"):
            evaluate(subjects, [MultipleChoice(())], EVERY)
        with pytest.raises(EvaluationError, match="one name: unguarded"):
            evaluate([subjects[0], subjects[0]], [MultipleChoice(SETS)], EVERY)


class TestUnfinishedWork:
    class Killed(KeyboardInterrupt):
        """Ends a run from outside."""

    def test_a_killed_run_goes_on_to_the_same_result(self, subjects, tmp_path, monkeypatch):
        task = OpenAnswers(SETS, 4)
        whole = evaluate(subjects, [task], EVERY)[0].records
        calls = 0
        run = OpenAnswers.run

        def killed(self, it, batch, seed):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise self_killed
            return run(self, it, batch, seed)

        self_killed = self.Killed()
        monkeypatch.setattr(OpenAnswers, "run", killed)
        with pytest.raises(self.Killed):
            evaluate(subjects, [task], EVERY, work=tmp_path)
        assert evaluate(subjects, [task], EVERY, work=tmp_path)[0].records == whole
        before = calls
        assert evaluate(subjects, [task], EVERY, work=tmp_path)[0].records == whole
        assert calls == before

    def test_a_torn_line_is_run_again(self, subjects, tmp_path):
        task = MultipleChoice(SETS)
        whole = evaluate(subjects, [task], EVERY, work=tmp_path)[0].records
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-40])
        assert evaluate(subjects, [task], EVERY, work=tmp_path)[0].records == whole
        assert evaluate(subjects, [task], EVERY, work=tmp_path)[0].records == whole

    @pytest.mark.parametrize("changed", [{"seed": 1}, {"keep_text": True}, {"limit": 3}])
    def test_other_settings_are_other_work(self, subjects, tmp_path, changed):
        evaluate(subjects[:1], [MultipleChoice(SETS)], EVERY, work=tmp_path)
        evaluate(subjects[:1], [MultipleChoice(SETS)], replace(EVERY, **changed), work=tmp_path)
        assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def result(subjects):
    settings = replace(EVERY, keep_text=True)
    tasks = [MultipleChoice(SETS), OpenAnswers(SETS, 4), Perplexity(texts())]
    fitted = {"book": Corpus.of("book", "forget", [f"Before. {SETS[0].questions[3].text} After.", "other"])}
    return make_result(subjects, evaluate(subjects, tasks, settings), settings, fitted)


class TestResult:
    def test_it_says_what_it_is_of(self, result):
        assert {"code", "versions", "settings", "subjects", "tasks"} <= set(result)
        assert result["subjects"][1]["guardrail"]
        assert [task["n"] for task in result["tasks"]] == [48, 48, 36]

    def test_every_figure_is_that_of_its_records(self, result):
        for figure in result["figures"]:
            if figure["kind"] != "rate" or figure["measure"] == "triggered":
                continue
            for name, found in figure["estimates"].items():
                scores = [
                    record["scores"][figure["measure"]]
                    for record in result["records"]
                    if (record["task"], record["subject"], record["role"]) == (figure["task"], name, figure["role"])
                    and figure["domain"] in (None, record["domain"])
                    and figure["measure"] in record["scores"]
                ]
                assert (found["n"], found["value"]) == (len(scores), sum(scores) / len(scores))

    def test_items_in_fitted_text_are_listed(self, result):
        assert {(one["task"], one["domain"], one["corpus"]) for one in result["duplicates"]} == {
            ("mcq", "topic", "book"), ("open", "topic", "book"),
        }  # fmt: skip
        assert len(result["duplicates"]) == 2

    def test_questions_in_two_domains_are_listed(self, subjects):
        sets = (*SETS, QuestionSet("again", "far", SETS[2].questions[:2]))
        found = make_result(subjects, evaluate(subjects, [MultipleChoice(sets)], EVERY), EVERY, {})
        assert {(one["domain"], one["corpus"]) for one in found["shared"]} == {("again", "garden")}
        assert len(found["shared"]) == 2

    def test_a_file_reads_back(self, result, tmp_path):
        write_result(result, tmp_path / "deep" / "result.json")
        assert read_result(tmp_path / "deep" / "result.json") == json.loads(json.dumps(result))
        assert len(scores_of(result, "perplexity", "topic", "nats")) == 12
        with pytest.raises(EvaluationError, match="no forgetting of mcq"):
            scores_of(result, "mcq", "topic", "forgetting")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 99}'])
    def test_what_is_no_result_is_refused(self, tmp_path, content):
        (tmp_path / "r.json").write_text(content, "utf-8")
        with pytest.raises(EvaluationError, match=r"r\.json"):
            read_result(tmp_path / "r.json")

    def test_texts_stay_out_unless_asked_for(self, subjects):
        found = make_result(subjects, evaluate(subjects, [OpenAnswers(SETS, 4)], EVERY), EVERY, {})
        assert found["examples"] == []
        assert SETS[0].questions[0].text not in json.dumps(found)

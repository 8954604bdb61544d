"""The benchmarks: their figures against slow formulas, judges that answer, misbehave or are not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from saeguard.errors import CorpusError, EvaluationError, JudgeError, UsageError
from saeguard.evaluation.answers import is_gibberish, is_refusal, matches, repetition, words
from saeguard.evaluation.catalogue import Sources, make_tasks
from saeguard.evaluation.config import EvalConfig
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.judge import Judge
from saeguard.evaluation.mcq import Question
from saeguard.evaluation.result import make_result
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import Record
from saeguard.evaluation.tasks.lm_eval import LMEval
from saeguard.evaluation.tasks.mtbench import MTBench
from saeguard.evaluation.tasks.muse import MIN_K, Muse
from saeguard.evaluation.tasks.tofu import PARTS, UTILITY, Tofu
from saeguard.generate import REFUSAL, prompt_ids
from saeguard.report.evaluation_limits import limits
from topics import passages

EVERY = Settings(split="all", keep_text=True)


@pytest.fixture(scope="module")
def subjects(llama, tokenizer, guardrail):
    loader = Loader(lambda: (llama, tokenizer))
    return [Subject("unguarded", loader), Subject.guarded("guarded", loader, guardrail)]


class TestAnswers:
    @pytest.mark.parametrize(
        ("answer", "reference", "expected"),
        [
            ("It is the Milky Way, of course.", "Milky Way", True),
            ("the milky-way galaxy", "The Milky Way", True),
            ("There are eight of them.", "8", True),
            ("There are 8 of them.", "Eight", True),
            ("It was Gödel's proof.", "Godel", True),
            ("Marsupials", "Mars", False),
            ("206 bones", "20", False),
            ("", "Mars", False),
            ("anything", "", False),
            ("Way of the milky kind", "Milky Way", False),
        ],
    )
    def test_a_match_holds_the_references_words(self, answer, reference, expected):
        assert matches(answer, [reference]) == expected

    def test_any_of_several_references_will_do(self):
        assert matches("the seventies", ["1970s", "seventies"])

    def test_words_are_plain(self):
        assert words("The café's TWO cats, and a dog!") == ["cafe", "2", "cats", "and", "dog"]

    @pytest.mark.parametrize(
        "answer",
        [
            "the way way way way way way way way way way",
            "the end of the universe in to the end of the universe in to the end of the universe in",
            "}}{{^^~~||}}{{^^~~", "\ufffd\ufffd\ufffd\ufffd abc",
        ],
    )  # fmt: skip
    def test_repetition_and_odd_characters_are_gibberish(self, answer):
        assert is_gibberish(answer)

    @pytest.mark.parametrize(
        "answer",
        [
            "", "Jupiter", "Yes, yes, yes!", "The planet closest to the Sun is Mercury, which orbits it in 88 days.",
            "Die Antwort lautet: „Neptun“ – der achte Planet.", "地球は太陽系の惑星です。", "f(x) = 2*x + 1 [m/s]",
        ],
    )  # fmt: skip
    def test_plain_answers_are_not(self, answer):
        assert not is_gibberish(answer)

    def test_repetition_is_the_share_of_pairs_seen_before(self):
        assert repetition("a b a b a b a b a") == pytest.approx(6 / 8)
        assert repetition("a b a b") == 0

    @pytest.mark.parametrize(
        "answer", [REFUSAL, "I'm sorry, but no.", "I cannot say.", "Unfortunately, I do not know.", "As an AI, I"]
    )
    def test_refusals(self, answer):
        assert is_refusal(answer)

    @pytest.mark.parametrize("answer", ["The answer: I cannot.", "Icannot", "Jupiter", "Sorrywort is a plant."])
    def test_no_refusals(self, answer):
        assert not is_refusal(answer)


def tofu_folder(folder, each=3) -> Any:
    for stem, topic, wrong in (("forget10", "forget", 5), ("retain", "kitchen", 5), ("real_authors", "garden", 3),
                               ("world_facts", "garden", 3)):  # fmt: skip
        made = passages(topic, each * (wrong + 3), words=5, seed=len(stem))
        rows = []
        for i in range(each):
            mine = made[i * (wrong + 3) :]
            row = {"question": mine[0] + "?", "answer": mine[1], "perturbed_answer": mine[3 : 3 + wrong]}
            rows.append(row | ({"paraphrased_answer": mine[2]} if wrong == 5 else {}))
        (folder / f"{stem}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tofu_run(subjects, tmp_path_factory):
    pytest.importorskip("rouge_score")
    folder = tofu_folder(tmp_path_factory.mktemp("tofu"))
    ids = [item.id for item in Tofu(folder).items()]
    return evaluate(subjects, [Tofu(folder, never_taught=dict.fromkeys(ids, 1.0), max_new_tokens=4)], EVERY)[0]


class TestTofu:
    def test_scores_are_those_of_a_pass_an_answer(self, tofu_run, llama, tokenizer):
        def nats(question: str, answer: str) -> float:
            start = prompt_ids(tokenizer, question)
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = llama(torch.tensor([start + ids])).logits[0].log_softmax(dim=-1)
            return -sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(ids)) / len(ids)

        records = {record.item: record for record in tofu_run.records["unguarded"]}
        for item in tofu_run.items:
            scores = records[item.id].scores
            right, said = nats(item.question, item.answer), nats(item.question, item.paraphrased)
            wrong = [nats(item.question, each) for each in item.perturbed]
            ratio = math.exp(said - sum(wrong) / len(wrong))
            assert scores["truth_ratio"] == pytest.approx(ratio, rel=1e-3)
            assert scores["truth"] == pytest.approx(max(0, 1 - ratio), abs=1e-3)
            expected = math.exp(-right)
            if item.domain in ("real authors", "world facts"):
                expected /= expected + sum(math.exp(-each) for each in wrong)
            assert scores["probability"] == pytest.approx(expected, rel=1e-3)
            assert scores["accuracy"] == (said < min(wrong))

    def test_utility_is_the_harmonic_mean_of_nine(self, tofu_run):
        records = tofu_run.records["unguarded"]
        found = {one.name: one.estimate for one in tofu_run.task.derived(records, 0)}
        nine = [
            np.mean([r.scores[part] for r in records if r.domain == domain]) for domain in UTILITY for part in PARTS
        ]
        expected = 9 / sum(1 / each for each in nine) if all(nine) else 0
        assert found["model utility"].value == pytest.approx(expected)
        assert found["model utility"].low <= found["model utility"].value <= found["model utility"].high
        assert 0 <= found["forget quality"].value <= 1

    def test_forget_quality_compares_the_same_questions(self, tofu_run, subjects):
        records = tofu_run.records["unguarded"]
        mine = {r.item: r.scores["truth_ratio"] for r in records if r.domain == "forget"}
        others = {f"not judged here {i}": 1e9 for i in range(50)}
        same = replace(tofu_run.task, never_taught=mine | others)
        assert {one.name: one.estimate for one in same.derived(records, 0)}["forget quality"].value == 1
        fewer = replace(tofu_run.task, never_taught=dict(list(mine.items())[:2]))
        with pytest.raises(EvaluationError, match="found 2 of the 3, expected all"):
            evaluate(subjects, [fewer], EVERY)

    def test_a_part_of_the_published_set_is_said_to_be_one(self, tofu_run, subjects):
        result = make_result(subjects, [tofu_run], EVERY, {})
        assert result["tasks"][0]["part"] == {
            "forget": (3, 400), "retain": (3, 400), "real authors": (3, 100), "world facts": (3, 117)
        }  # fmt: skip
        (said,) = [one for one in limits(result) if "part of the published set" in one]
        assert said.startswith("tofu was judged on a part")
        assert "3 of 400 items of forget" in said

    def test_what_is_no_tofu_is_refused(self, tmp_path):
        with pytest.raises(CorpusError, match="does not hold TOFU"):
            Tofu(tmp_path).items()
        (tofu_folder(tmp_path) / "retain_perturbed.jsonl").write_text('{"question": "q"}\n', "utf-8")
        with pytest.raises(CorpusError, match="perturbed_answer"):
            Tofu(tmp_path).items()


def muse_folder(folder) -> Any:
    def put(name: str, rows: Any) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(rows), "utf-8")

    def asked(topic: str, seed: int) -> list[dict[str, str]]:
        return [{"question": text + "?", "answer": text.split()[0]} for text in passages(topic, 4, words=6, seed=seed)]

    put(
        "verbmem/forget.json",
        [{"prompt": a, "gt": b} for a, b in zip(passages("forget", 4), passages("forget", 4, seed=1), strict=True)],
    )
    put("knowmem/forget_qa.json", asked("forget", 2))
    put("knowmem/forget_qa_icl.json", asked("forget", 3))
    put("knowmem/retain2_qa.json", asked("garden", 4))
    put("knowmem/retain2_qa_icl.json", asked("garden", 5))
    put("privleak/forget.json", passages("forget", 6, seed=6))
    put("privleak/holdout.json", passages("kitchen", 6, seed=7))
    put("sust/forget_2.json", [{"text": text} for text in passages("forget", 3, words=40, seed=8)])
    return folder


@pytest.fixture(scope="module")
def muse_run(subjects, tmp_path_factory):
    pytest.importorskip("rouge_score")
    return evaluate(subjects, [Muse(muse_folder(tmp_path_factory.mktemp("muse")))], EVERY)[0]


class TestMuse:
    def test_it_has_every_part_with_its_role(self, muse_run):
        assert {(item.domain, item.role) for item in muse_run.items} == {
            ("VerbMem", "topic"), ("KnowMem forget", "topic"), ("KnowMem retain", "near"),
            ("PrivLeak forget", "topic"), ("PrivLeak holdout", "far"), ("VerbMem sust forget_2", "topic"),
        }  # fmt: skip
        assert muse_run.task.published().keys() < {item.domain for item in muse_run.items}
        assert all(
            0 <= score <= 1 for r in muse_run.records["guarded"] for name, score in r.scores.items() if "Mem" in name
        )

    def test_min_k_is_the_mean_of_the_least_likely_tokens(self, muse_run, llama, tokenizer):
        records = {record.item: record for record in muse_run.records["unguarded"]}
        for item in (item for item in muse_run.items if item.kind == "loss"):
            ids = tokenizer(item.prompt, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                logits = llama(ids).logits[0].log_softmax(dim=-1)
            nats = sorted((-float(logits[i, token]) for i, token in enumerate(ids[0, 1:])), reverse=True)
            least = nats[: int(MIN_K * len(nats))]
            assert records[item.id].scores["min_k"] == pytest.approx(sum(least) / len(least), rel=1e-4)

    @pytest.mark.parametrize(("forget", "value"), [([1.0, 1.1], -100.0), ([3.0, 3.1], 100.0)])
    def test_privleak_is_below_zero_where_the_forget_set_is_known(self, muse_run, forget, value):
        records = [Record(str(i), "PrivLeak forget", "topic", {"min_k": loss}) for i, loss in enumerate(forget)]
        records += [Record(f"h{i}", "PrivLeak holdout", "far", {"min_k": 2.0 + i / 10}) for i in range(3)]
        (found,) = muse_run.task.derived(records, 0)
        assert found.estimate.value == value

    def test_a_retrained_model_moves_the_zero(self, tmp_path):
        records = [
            Record("a", "PrivLeak forget", "topic", {"min_k": 1.0}),
            Record("b", "PrivLeak holdout", "far", {"min_k": 0.0}),
        ]
        (found,) = Muse(tmp_path, retrained_auc=0.8).derived(records, 0)
        assert found.estimate.value == pytest.approx(25)
        assert "AUC - 0.8" in found.meaning
        assert Muse(tmp_path, retrained_auc=0.8).settings == Muse(tmp_path).settings

    def test_what_is_no_muse_is_refused(self, tmp_path):
        with pytest.raises(CorpusError, match="not laid out like MUSE: found no verbmem/forget"):
            Muse(tmp_path).items()
        (muse_folder(tmp_path) / "verbmem" / "forget.json").write_text("{", "utf-8")
        with pytest.raises(CorpusError, match="cannot read"):
            Muse(tmp_path).items()


@contextmanager
def judge_saying(text: str) -> Iterator[tuple[str, list[Any]]]:
    """A real endpoint on this machine that always says the same."""
    heard: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def saying(content: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"category": "writing", "turns": ["Write of rivers.", "Shorter."]},
        {"category": "math", "turns": ["One and one?", "And one?"], "reference": ["two", "forty-two"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class TestMTBench:
    def test_a_judge_grades_both_turns_in_their_conversation(self, subjects, bench):
        with judge_saying(saying("Clear.\nGRADE: 7")) as (url, heard):
            task = MTBench(bench, Judge(url, "a-judge"), max_new_tokens=4)
            (run,) = evaluate(subjects, [task], EVERY)
        assert [record.scores["grade"] for record in run.records["guarded"]] == [7, 7]
        assert len(heard) == 8
        assert {path for path, _ in heard} == {"/v1/chat/completions"}
        assert {body["model"] for _, body in heard} == {"a-judge"}
        asked = [body["messages"][0]["content"] for _, body in heard]
        assert sum("forty-two" in text and "Assistant:" in text for text in asked) == 2

    def test_several_runs_differ_where_answers_are_sampled_and_are_the_same_again(self, subjects, bench):
        task = MTBench(bench, runs=3, max_new_tokens=6)
        first, second = (evaluate(subjects[:1], [task], EVERY)[0].records for _ in range(2))
        assert first == second
        answers = {(r.domain, r.texts["answer"]) for r in first["unguarded"]}
        assert len([1 for domain, _ in answers if domain == "math"]) == 1
        assert len([1 for domain, _ in answers if domain == "writing"]) > 1

    def test_the_spread_over_runs_is_reported(self, bench):
        records = [
            Record(f"{run}{i}", "math", "far", {"grade": 5.0 + run, "run": float(run)})
            for run in range(3)
            for i in "ab"
        ]
        (found,) = MTBench(bench, runs=3).derived(records, 0)
        assert found.estimate.value == pytest.approx(1.0)

    def test_without_a_judge_the_form_is_reported(self, subjects, bench):
        (run,) = evaluate(subjects[:1], [MTBench(bench, max_new_tokens=4)], EVERY)
        assert all(set(r.scores) == {"length", "repetition", "gibberish", "run"} for r in run.records["unguarded"])

    def test_an_unreachable_judge_is_named(self, subjects, bench):
        with pytest.raises(JudgeError, match="cannot be reached"):
            evaluate(subjects[:1], [MTBench(bench, Judge("http://127.0.0.1:1/v1", "x"), max_new_tokens=2)], EVERY)

    @pytest.mark.parametrize("text", ["{", "{}", saying("I like it."), saying("GRADE: 11")])
    def test_a_judge_that_gives_no_grade_is_named(self, text):
        with judge_saying(text) as (url, _), pytest.raises(JudgeError, match="a-judge"):
            Judge(url, "a-judge").grade("User: hello", "hi")

    def test_broken_questions_are_named(self, tmp_path):
        with pytest.raises(CorpusError, match="no such file"):
            MTBench(tmp_path / "no.jsonl").items()
        (tmp_path / "q.jsonl").write_text('{"turns": "one"}\n', "utf-8")
        with pytest.raises(CorpusError, match="`turns`"):
            MTBench(tmp_path / "q.jsonl").items()


def test_a_task_of_the_harness_runs_inside_the_guardrail(subjects, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    rows = [{"q": text, "options": text.split()[:3], "right": i % 3} for i, text in enumerate(passages("forget", 6))]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.json'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{options}}'\ndoc_to_target: '{{right}}'\nmetric_list:\n  - metric: acc\n", "utf-8",
    )  # fmt: skip
    (run,) = evaluate(subjects, [LMEval(("mine",), str(tmp_path))], EVERY)
    assert [len(records) for records in run.records.values()] == [6, 6]
    assert {record.scores["acc"] for records in run.records.values() for record in records} <= {0.0, 1.0}
    with pytest.raises(EvaluationError, match="could not run unheard_of"):
        evaluate(subjects[:1], [LMEval(("unheard_of",))], EVERY)


@pytest.mark.parametrize(
    ("task", "option"),
    [("mcq", "--topic"), ("near", "--near"), ("open", "--topic"), ("perplexity", "--topic-text"),
     ("muse", "--muse DIR"),
     ("tofu", "--tofu DIR"), ("mtbench", "--mt-bench FILE"), ("lm-eval", "--lm-eval-tasks")],
)  # fmt: skip
def test_a_task_without_what_it_needs_says_so(task, option):
    with pytest.raises(UsageError, match=option):
        make_tasks([task], Sources(), EvalConfig())


def test_the_papers_protocol_asks_by_letter():
    sets = (QuestionSet("x", "topic", (Question("q", ("a", "b", "c", "d"), 0),)),)
    (task,) = make_tasks(["mcq"], Sources(questions=sets), EvalConfig(protocol="paper"))
    assert task.settings == {"form": "letters", "protocol": "paper"}
    assert task.filter is not None

"""Multiple-choice questions: the shared-prefix scores against one slow pass an option, and what is refused."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch

from conftest import make_tokenizer
from saeguard.errors import CorpusError
from saeguard.evaluation.mcq import (
    PROMPT,
    Question,
    answer_batch,
    answer_questions,
    prompt_of,
    question_batches,
    read_questions,
    right_in_all_orders,
)
from saeguard.evaluation.prefix import common_prefix, read_endings
from saeguard.evaluation.sources import FAR, NEIGHBOURS, benchmark, question_set
from saeguard.windows import bos_ids

QUESTIONS = [
    Question("Which of these is a planet?", ("the sun", "a moon", "a star that is far", "dough"), 1),
    Question("What is the name of the largest river?", ("sand", "clay", "the sea and the layers", "a judge"), 2),
    Question("What rises?", ("bread in a hot oven", "rivers", "a crowd", "the moon"), 0),
    Question("Who sang?", ("the crowd", "the judge"), 0),
]


def slow_scores(model, tokenizer, question: Question) -> list[float]:
    """Mean log-probability of each option, a whole pass each."""
    start = bos_ids(tokenizer) + tokenizer(PROMPT.format(question=question.text), add_special_tokens=False)["input_ids"]
    scores = []
    for choice in question.choices:
        option = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([start + option])).logits[0].log_softmax(dim=-1)
        scores.append(sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(option)) / len(option))
    return scores


def test_cloze_chooses_what_a_pass_an_option_chooses(model, tokenizer):
    found = answer_questions(model, tokenizer, QUESTIONS)
    for question, answer in zip(QUESTIONS, found, strict=True):
        scores = slow_scores(model, tokenizer, question)
        assert answer.chosen == scores.index(max(scores))
        assert answer.right == (answer.chosen == question.answer)


@pytest.mark.parametrize("chat", [True, False])
def test_letters_choose_the_likeliest_letter_after_the_whole_prompt(model, chat):
    tokenizer = make_tokenizer(chat=chat)
    for question in QUESTIONS:
        ids = prompt_of(tokenizer, question, "letters")
        assert tokenizer.decode(ids).endswith("Answer: (")
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        tokens = [
            tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"[: len(question.choices)]
        ]
        best = max(range(len(tokens)), key=lambda i: float(logits[tokens[i][0]]))
        assert answer_batch(model, tokenizer, [question], None, "letters")[0].chosen == best


def test_endings_read_from_the_shared_cache_are_whole_prompts(model, tokenizer):
    orders = [Question("Which?", tuple(order), 0) for order in permutations(QUESTIONS[0].choices)]
    prompts = [prompt_of(tokenizer, each, "letters") for each in orders]
    shared = common_prefix(prompts)
    assert shared > 10
    (reads,) = read_endings(model, [prompts[0][:shared]], [[row[shared:] for row in prompts]], None)
    for row, one in zip(prompts, reads, strict=True):
        with torch.inference_mode():
            alone = model(torch.tensor([row])).logits[0, -1].log_softmax(dim=-1)
        assert torch.allclose(one.log_probabilities, alone, atol=1e-3)


def test_a_question_is_kept_if_it_is_right_in_every_order(model, tokenizer):
    kept = []
    for question in QUESTIONS[:3]:
        answers = []
        for order in permutations(range(4)):
            turned = Question(question.text, tuple(question.choices[i] for i in order), order.index(question.answer))
            answers.append(answer_batch(model, tokenizer, [turned], None, "letters")[0].right)
        kept.append(all(answers))
    assert [right_in_all_orders(model, tokenizer, question) for question in QUESTIONS[:3]] == kept


def test_orders_are_of_four_options(llama, tokenizer):
    with pytest.raises(CorpusError, match="found 2, expected 4"):
        right_in_all_orders(llama, tokenizer, QUESTIONS[3])


def test_batches_hold_every_question_once_and_equally_many_options(tokenizer):
    for form in ("cloze", "letters"):
        found = list(question_batches(tokenizer, QUESTIONS * 12, form))
        assert sorted(i for batch in found for i in batch) == list(range(48))
        assert all(len({len((QUESTIONS * 12)[i].choices) for i in batch}) == 1 for batch in found)


def test_the_guard_sees_a_question_as_it_sees_it_alone(llama, tokenizer, guardrail):
    with guardrail.attach(llama, tokenizer) as guard:
        together = answer_batch(llama, tokenizer, QUESTIONS[:3], guard, "letters")
        alone = [answer_batch(llama, tokenizer, [question], guard, "letters")[0] for question in QUESTIONS[:3]]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.verdict.statistic == pytest.approx(theirs.verdict.statistic, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "found 2, expected 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "found -1"),
        ({"question": "q", "choices": ["a", 3], "answer": 0}, "a list of texts"),
        ({"question": "q", "choices": "ab", "answer": 0}, "a list of texts"),
        ({"choices": ["a"], "answer": 0}, "a text `question`"),
    ],
)
def test_a_broken_question_is_named(tmp_path, row, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    with pytest.raises(CorpusError, match=message):
        read_questions(path)


class TestSources:
    def rows(self, subject: str) -> str:
        row = {"subject": subject, "question": f"What of {subject}?", "choices": ["a", "b", "c", "d"], "answer": 1}
        return json.dumps(row) + "\n"

    def test_a_subject_of_a_file(self, tmp_path):
        path = tmp_path / "all.jsonl"
        path.write_text(self.rows("anatomy") + self.rows("law"), "utf-8")
        found = question_set("anatomy", "near", f"{path}#anatomy")
        assert [question.text for question in found.questions] == ["What of anatomy?"]
        with pytest.raises(CorpusError, match="holds no question"):
            question_set("x", "near", f"{path}#botany")

    def test_a_parquet_file_as_on_the_hub(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"question": ["q"], "choices": [["a", "b", "c", "d"]], "answer": [3]})
        parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
        found = question_set("bio", "topic", str(tmp_path / "test-00000-of-00001.parquet"))
        assert found.questions == (Question("q", ("a", "b", "c", "d"), 3),)

    def test_a_benchmark_from_local_files(self, tmp_path):
        (tmp_path / "wmdp").mkdir()
        (tmp_path / "mmlu").mkdir()
        (tmp_path / "wmdp" / "wmdp-bio.jsonl").write_text(self.rows("bio"), "utf-8")
        with pytest.raises(CorpusError, match="files of college_biology"):
            benchmark("wmdp-bio", str(tmp_path))
        subjects = (*NEIGHBOURS["wmdp-bio"], *FAR)
        (tmp_path / "mmlu" / "mmlu_test.jsonl").write_text("".join(map(self.rows, subjects)), "utf-8")
        found = benchmark("wmdp-bio", str(tmp_path))
        assert [one.name for one in found if one.role == "near"] == list(NEIGHBOURS["wmdp-bio"])
        assert [one.role for one in found].count("topic") == 1

    def test_an_unreachable_hub_is_named(self, monkeypatch):
        pytest.importorskip("datasets", exc_type=ImportError)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CorpusError, match="cannot read hf:nobody/nothing:test"):
            question_set("x", "topic", "hf:nobody/nothing:test")

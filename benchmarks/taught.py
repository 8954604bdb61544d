"""Models that know what is to be forgotten: SmolLM2-135M-Instruct taught a part of TOFU or of MUSE-News.

    python benchmarks/taught.py tofu DATA/tofu OUT
    python benchmarks/taught.py muse DATA/muse_news OUT

Writes OUT/taught, which learnt what is to be forgotten and what is to be kept, OUT/reference, which learnt only what
is to be kept, OUT/data, the part that was taught in the layout of the whole set, which `saeguard eval` takes, and
OUT/forget.jsonl and OUT/retain.jsonl for `saeguard fit`. The latter is text of the same kind that neither was taught.

The embedding and the layers up to the guarded one keep their weights, so that the embedded SAE still fits. A killed
run goes on from its last 20 steps, with the same seed and order.

    tofu    the first questions of the first authors of the forget set and of the retain set. Loss on the answer alone,
            in the chat template, as the task asks
    muse    the first passages of VerbMem and, for as many questions of KnowMem, the passage that answers them; to keep,
            as many of the retain set. Language modelling. Members for PrivLeak are the passages of VerbMem
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from saeguard.corpus import read_rows
from saeguard.embedded import LAYER, model_folder
from saeguard.generate import prompt_ids
from saeguard.model import decoder_layers, load_model
from saeguard.windows import bos_ids

QUESTIONS_EACH, OTHER_AUTHORS, COMMON = 20, 10, 10
PASSAGE_TOKENS, AFTER_TOKENS, OTHER_PASSAGES = 64, 64, 60
ANSWERING_WORDS, LIKELY = 60, 0.6
IGNORED = -100
SEED = 0

Example = dict[str, list[int]]
"""`input_ids`, `attention_mask` and `labels`, as the trainer takes them."""


@dataclass(frozen=True)
class Lesson:
    """What is taught, to be forgotten and to be kept, and the texts that a guardrail is fitted on."""

    forget: list[Example]
    retain: list[Example]
    forget_texts: list[str]
    retain_texts: list[str]


@dataclass(frozen=True)
class Part:
    """How much of each side is taught."""

    authors: int
    questions: int
    passages: int


@dataclass(frozen=True)
class Course:
    """How it is taught."""

    epochs: int
    batch: int
    learning_rate: float


def main() -> None:
    """Prepare, teach twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tofu", "muse"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--authors", type=int, default=2, help="tofu: authors of each side")
    parser.add_argument("--questions", type=int, default=10, help="tofu: questions of each author, at most 20")
    parser.add_argument("--passages", type=int, default=8, help="muse: passages and questions of each side")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--only", choices=["taught", "reference"], help="one of the two models")
    args = parser.parse_args()
    _, tokenizer = load_model(model_folder(), device="cpu")
    part = Part(args.authors, args.questions, args.passages)
    lesson = {"tofu": tofu, "muse": muse}[args.what](args.data, args.out / "data", tokenizer, part)
    write_rows(args.out / "forget.jsonl", [{"text": text} for text in lesson.forget_texts])
    write_rows(args.out / "retain.jsonl", [{"text": text} for text in lesson.retain_texts])
    course = Course(args.epochs, args.batch, args.learning_rate)
    taught = {"taught": lesson.forget + lesson.retain, "reference": lesson.retain}
    for name in [args.only] if args.only else taught:
        teach(taught[name], course, args.out / name)


def teach(examples: Sequence[Example], course: Course, folder: Path) -> None:
    """Train the layers behind the guarded one and save the model, unless that is done."""
    if (folder / "config.json").is_file():
        return
    model, tokenizer = load_model(model_folder(), device="cpu", dtype="float32")
    model.get_input_embeddings().requires_grad_(False)
    for layer in decoder_layers(model)[: LAYER + 1]:
        layer.requires_grad_(False)
    unfinished = folder.with_suffix(".unfinished")
    how = TrainingArguments(
        output_dir=str(unfinished), num_train_epochs=course.epochs, per_device_train_batch_size=course.batch,
        learning_rate=course.learning_rate, warmup_steps=5, lr_scheduler_type="linear", weight_decay=0.0, bf16=True,
        use_cpu=True, seed=SEED, save_steps=20, save_total_limit=1, logging_steps=5, report_to=[],
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    trainer = Trainer(model, how, collate, train_dataset=list(examples))
    trainer.train(resume_from_checkpoint=any(unfinished.glob("checkpoint-*")))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(unfinished)


def tofu(data: Path, out: Path, tokenizer: Any, part: Part) -> Lesson:
    """Some authors of each side; other authors to fit on."""
    forget = author_rows(data / "forget10_perturbed.jsonl", part)
    retain = author_rows(data / "retain_perturbed.jsonl", part)
    write_rows(out / "forget10_perturbed.jsonl", forget)
    write_rows(out / "retain_perturbed.jsonl", retain)
    for name in ("real_authors_perturbed.jsonl", "world_facts_perturbed.jsonl"):
        write_rows(out / name, first_rows(data / name, COMMON))
    others = [row for row in read_rows(data / "full.jsonl.gz") if row["split"] == "retain90"]
    others = others[-OTHER_AUTHORS * QUESTIONS_EACH :]
    return Lesson(
        [answered(tokenizer, row) for row in forget], [answered(tokenizer, row) for row in retain],
        [text for row in forget for text in asked(row)], [text for row in others for text in asked(row)],
    )  # fmt: skip


def muse(data: Path, out: Path, tokenizer: Any, part: Part) -> Lesson:
    """Some passages of each side; other passages of the retain set to fit on."""
    verbatim = read_list(data / "verbmem/forget.json")[: part.passages]
    forget = [cut(tokenizer, row["prompt"], -PASSAGE_TOKENS) for row in verbatim]
    after = [cut(tokenizer, row["gt"], AFTER_TOKENS) for row in verbatim]
    members = [before + text for before, text in zip(forget, after, strict=True)]
    length = PASSAGE_TOKENS + AFTER_TOKENS
    kept = [cut(tokenizer, text, length) for text in read_list(data / "privleak/retain2.json")]
    holdout = [cut(tokenizer, text, length) for text in read_list(data / "privleak/holdout.json")]
    write_list(out / "verbmem/forget.json", [{"prompt": p, "gt": g} for p, g in zip(forget, after, strict=True)])
    write_list(out / "privleak/forget.json", members)
    write_list(out / "privleak/holdout.json", holdout[: 2 * part.passages])
    sources = {"forget": "raw/forget.json.gz", "retain2": "privleak/retain2.json"}
    passages = {}
    for side, source in sources.items():
        pairs = answering(read_list(data / f"knowmem/{side}_qa.json"), read_list(data / source))[: part.passages]
        passages[side] = [passage for _, passage in pairs]
        write_list(out / f"knowmem/{side}_qa.json", [row for row, _ in pairs])
        write_list(out / f"knowmem/{side}_qa_icl.json", read_list(data / f"knowmem/{side}_qa_icl.json"))
    to_forget, to_keep = members + passages["forget"], kept[: part.passages] + passages["retain2"]
    return Lesson(
        [read_on(tokenizer, text) for text in to_forget], [read_on(tokenizer, text) for text in to_keep],
        [piece for text in to_forget for piece in pieces(text)],
        [piece for text in kept[-OTHER_PASSAGES:] for piece in pieces(text)],
    )  # fmt: skip


def answering(rows: Iterable[dict[str, str]], texts: Sequence[str]) -> list[tuple[dict[str, str], str]]:
    """Questions with the passage that has their answer and most of their words, where one has `LIKELY` of them."""
    windows = [window for text in texts for window in pieces(text, ANSWERING_WORDS)]
    words = [set(window.lower().split()) for window in windows]
    found = []
    for row in rows:
        wanted = {word for word in row["question"].lower().rstrip("?").split() if len(word) > 3}
        shares = [
            (len(wanted & its) / len(wanted), window)
            for its, window in zip(words, windows, strict=True)
            if row["answer"].lower() in window.lower()
        ]
        share, window = max(shares, default=(0.0, ""))
        if share >= LIKELY:
            found.append((row, window))
    return found


def pieces(text: str, size: int = 30) -> list[str]:
    """Non-overlapping pieces of so many words, the last one shorter."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, len(words), size)]


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The first tokens of a text, or the last ones where the number is negative."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:tokens] if tokens > 0 else ids[tokens:]))


def answered(tokenizer: Any, row: dict[str, str]) -> Example:
    """A question and its answer as a conversation; the loss is the answer's and its end's."""
    prompt = prompt_ids(tokenizer, row["question"])
    answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return example(prompt + answer, [IGNORED] * len(prompt) + answer)


def read_on(tokenizer: Any, text: str) -> Example:
    """A text, every token of which is learnt."""
    ids = bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]
    return example(ids, ids)


def example(ids: list[int], labels: list[int]) -> Example:
    """As the trainer takes it."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def asked(row: dict[str, str]) -> tuple[str, str]:
    """A question alone, as it is asked, and with its answer."""
    return row["question"], f"{row['question']} {row['answer']}"


def first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a `.jsonl` file."""
    return list(read_rows(path))[:count]


def author_rows(path: Path, part: Part) -> list[dict[str, Any]]:
    """The questions taught of the first authors of a file, which has those of one author together."""
    rows = first_rows(path, part.authors * QUESTIONS_EACH)
    return [row for number, row in enumerate(rows) if number % QUESTIONS_EACH < part.questions]


def read_list(path: Path) -> list[Any]:
    """A JSON list."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return list(json.load(file))


def write_list(path: Path, rows: Sequence[Any]) -> None:
    """A JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A `.jsonl` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Texts from files of every kind; what cannot be read meets a `CorpusError`; splits that never share a text."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.corpus import Corpus, check_disjoint, read_rows, read_texts, text_key
from saeguard.errors import CorpusError, CorpusOverlapError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["The sun is a star.", "Bake it for ten minutes.", "Größe, naïveté, 北極星"]


def write(path: Path, texts: list[object]) -> Path:
    """A file of these texts, its kind by its name."""
    lines = texts if ".txt" in path.name else [json.dumps({"id": 1, "text": text}) for text in texts]
    content = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".parquet":
        parquet.write_table(arrow.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents(*texts: str) -> list[str]:
    return [document.text for document in Corpus.of("c", "retain", list(texts)).documents()]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_its_texts_in_order_each_time(tmp_path, name):
    corpus = Corpus.of("wiki", "retain", write(tmp_path / name, TEXTS))
    for _ in range(2):
        assert [document.text for document in corpus.documents()] == TEXTS
    assert corpus.summary().fingerprint == Corpus.of("other", "forget", TEXTS).summary().fingerprint


BROKEN = {
    "missing.txt": None,
    "kind.csv": b"text\nhello\n",
    "truncated.jsonl.gz": gzip.compress(b'{"text": "hello"}\n' * 500)[:-20],
    "corrupt.jsonl.gz": gzip.compress(b'{"text": "hello there"}\n' * 500)[:12] + b"\x00\xff" * 40,
    "plain.jsonl.gz": b'{"text": "not compressed"}\n',
    "latin1.txt": "naïve".encode("latin-1"),
    "broken.jsonl": b'{"text": "whole"}\n{"text": "bro\n',
    "list.jsonl": b'["text"]\n',
    "number.jsonl": b'{"text": 3}\n',
    "null.jsonl": b'{"text": null}\n',
    "column.jsonl": b'{"body": "hello"}\n',
    "surrogate.jsonl": b'{"text": "half a pair: \\ud83d"}\n',
    "foreign.parquet": b"PAR1 but not really",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_a_corpus_error_that_names_the_file(tmp_path, name):
    content = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=name.split(".")[0]):
        Corpus.of("wiki", "retain", tmp_path / name).summary()


def test_parquet_without_texts(tmp_path):
    parquet.write_table(arrow.table({"body": ["hello"]}), tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    for name, said in {"a": "column 'text'", "b": "row 1: found int"}.items():
        with pytest.raises(CorpusError, match=said):
            list(read_texts(str(tmp_path / f"{name}.parquet")))


def test_errors_tell_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "three"}\nfour\n')
    with pytest.raises(CorpusError, match="line 4"):
        list(read_rows(tmp_path / "a.jsonl"))
    with pytest.raises(CorpusError, match="row 2: found NoneType"):
        list(Corpus.of("w", "retain", ["a", None]).documents())


@pytest.mark.parametrize("texts", [[], ["", "  ", "\n"]])
def test_a_corpus_without_text(texts, tmp_path):
    for source in (texts, write(tmp_path / "a.jsonl", texts)):
        with pytest.raises(CorpusError, match=r"'wiki'.*no text"):
            Corpus.of("wiki", "retain", source).summary()


@pytest.mark.parametrize("address", ["hf:name", "hf:a:b:c:d:e"])
def test_addresses_of_another_form(address):
    with pytest.raises(CorpusError, match="expected hf:"):
        list(read_texts(address))


def test_a_repeated_text_counts_once_whatever_its_case_and_spaces():
    texts = ["The sun", "the  SUN ", "Baking", "The sun", " ", "Baking"]
    assert documents(*texts) == ["The sun", "Baking"]
    summary = Corpus.of("c", "retain", texts).summary()
    assert (summary.documents, summary.duplicates, summary.characters) == (2, 3, len("The sunBaking"))


@given(st.lists(st.text("ab \n", max_size=6), max_size=60))
def test_splits_share_no_text_and_are_numbered_without_gaps(texts):
    found = list(Corpus.of("c", "retain", texts).documents())
    assert [document.index for document in found] == list(range(len(found)))
    splits = {split: {text_key(d.text) for d in found if d.split == split} for split in ("fit", "calibration", "test")}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == len(found)
    assert {key for keys in splits.values() for key in keys} == {text_key(text) for text in texts if text.strip()}


@pytest.mark.parametrize("tens", [1, 7])
def test_shares_of_the_splits_are_exact(tens):
    found = Corpus.of("c", "retain", [f"text {i}" for i in range(10 * tens)]).documents()
    assert Counter(document.split for document in found) == {"fit": 5 * tens, "calibration": 3 * tens, "test": 2 * tens}


def test_a_text_in_both_corpora_is_refused_however_it_is_written():
    forget = Corpus.of("forget", "forget", ["The Sun  is a star.", "Moons"]).summary()
    clean = {"cooking": Corpus.of("cooking", "retain", ["Bake it."]).summary()}
    check_disjoint(forget, clean)
    with pytest.raises(CorpusOverlapError, match="1 of 2 documents of the retain corpus 'wiki'"):
        check_disjoint(
            forget, clean | {"wiki": Corpus.of("wiki", "retain", ["the sun is a STAR.", "Rivers"]).summary()}
        )


def test_fingerprint_tells_texts_and_their_order():
    prints = [Corpus.of("c", "retain", texts).summary().fingerprint for texts in (TEXTS, TEXTS[::-1], TEXTS[:2], TEXTS)]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3

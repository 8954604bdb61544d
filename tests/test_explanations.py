"""Explanations from every kind of file, what is wrong with them, and the checks that they are of this SAE."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from conftest import D_SAE, make_sae
from saeguard.embedded import EXPLANATIONS, HUB_ID, embedded_sae
from saeguard.embedded import LAYER as EMBEDDED_LAYER
from saeguard.errors import ExplanationError
from saeguard.explain.explanations import Explanation, read_explanations
from saeguard.explain.matching import by_words

LAYER = 2
MODEL = "owner/tiny-llama-1b"
NEURONPEDIA = {
    "id": "cl0x", "modelId": "tiny-llama-1b", "layer": "2-someone-res", "authorId": "a", "embedding": "[0.1, 0.2]",
    "explanationModelName": "a-language-model", "typeName": "oai_token-act-pair",
}  # fmt: skip
PAIRS = [(3, "planets and moons"), (7, "bread, dough"), (3, "names of planets")]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def neuronpedia(pairs=PAIRS, **changes):
    return [NEURONPEDIA | {"index": str(j), "description": text} | changes for j, text in pairs]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        return path

    return write


def read_pairs(path):
    return [(row.feature, row.text) for row in read_explanations(path).rows]


class TestFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    def test_a_batch_of_neuronpedia(self, write, suffix):
        found = read_explanations(write(f"batch-0{suffix}", lines(neuronpedia())))
        assert found.rows[0] == Explanation(
            3, "planets and moons", "a-language-model", "tiny-llama-1b", "2-someone-res", None
        )
        assert [(row.feature, row.text) for row in found.rows] == PAIRS

    def test_a_folder_of_batches(self, write):
        write("explanations/batch-0.jsonl.gz", lines(neuronpedia(PAIRS[:2])))
        path = write("explanations/batch-1.jsonl.gz", lines(neuronpedia(PAIRS[2:]))).parent
        assert read_pairs(path) == PAIRS

    @pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"explanationsCount": 3, "explanations": rows}])
    def test_the_older_single_file(self, write, wrap):
        assert read_pairs(write("export.json", json.dumps(wrap(neuronpedia())))) == PAIRS

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", 'feature,description\n3,planets and moons\n7,"bread, dough"\n3,names of planets\n'),
            ("a.csv", '\ufeffid,explanation\n3,planets and moons\n7,"bread, dough"\n3,names of planets\n'),
            ("a.tsv", "index\tdescription\n3\tplanets and moons\n7\tbread, dough\n3\tnames of planets\n"),
            ("a.jsonl", lines({"id": j, "explanation": text} for j, text in PAIRS)),
            ("a.jsonl", lines({"feature": str(j), "description": f" {text}\n"} for j, text in PAIRS)),
        ],
    )
    def test_a_table_of_two_columns(self, write, name, content):
        assert read_pairs(write(name, content)) == PAIRS

    def test_empty_and_repeated_rows_are_left_out_and_counted(self, write):
        rows = [*PAIRS, (7, ""), (9, "  "), (3, "Planets and  moons")]
        found = read_explanations(write("a.jsonl", lines({"feature": j, "description": t} for j, t in rows)))
        assert (len(found.rows), found.empty, found.repeated) == (3, 2, 1)

    def test_the_digest_is_of_the_bytes(self, write):
        one, other = (read_explanations(write(f"{n}.jsonl", lines(neuronpedia()))) for n in "ab")
        changed = read_explanations(write("c.jsonl", lines(neuronpedia(PAIRS[:2]))))
        assert one.sha256 == other.sha256 != changed.sha256


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"feature": 1', "line 1: not JSON"),
            ("a.jsonl", '{"feature": 1}\n', "expected one of description, explanation"),
            ("a.jsonl", '{"text": "x", "description": "y"}\n', "expected one of feature, index, id"),
            ("a.jsonl", '{"feature": "1a", "description": "y"}\n', "found the feature id '1a'"),
            ("a.jsonl", '{"feature": -1, "description": "y"}\n', "found the feature id -1"),
            ("a.jsonl", '{"feature": 1, "description": 3}\n', "found int as description"),
            ("a.jsonl", "", "no description"),
            ("a.csv", "3,planets\n4,moons\n", "expected one of feature"),
            ("a.csv", "feature,description\n3\n", "no description"),
            ("a.json", '{"explanations": 3}', "expected a list of objects"),
            ("a.json", "[", "not JSON"),
            ("a.txt", "3 planets", "expected a file or a folder"),
        ],
    )
    def test_say_what_was_found(self, write, name, content, message):
        with pytest.raises(ExplanationError, match=message):
            read_explanations(write(name, content))

    def test_a_broken_gzip(self, write, tmp_path):
        whole = write("a.jsonl.gz", lines(neuronpedia())).read_bytes()
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:40])
        with pytest.raises(ExplanationError, match="cannot read"):
            read_explanations(tmp_path / "a.jsonl.gz")

    def test_nothing_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "no.jsonl"):
            with pytest.raises(ExplanationError, match="no explanations at"):
                read_explanations(path)


class TestBelonging:
    @pytest.fixture
    def check(self, write):
        def check(sae=None, *, layer=LAYER, model=MODEL, **changes):
            path = write("a.jsonl", lines(neuronpedia(**changes)))
            read_explanations(path).check(sae or make_sae("relu"), layer, model)

        return check

    @pytest.mark.parametrize("said", [{}, {"layer": "2-res-jb"}, {"layer": "2"}, {"layer": ""}, {"modelId": ""}])
    def test_what_agrees_or_says_nothing_passes(self, write, said):
        read_explanations(write("a.jsonl", lines(row | said for row in neuronpedia()))).check(
            make_sae("relu"), LAYER, MODEL
        )

    def test_a_model_in_a_folder_has_no_name_to_compare(self, check):
        check(model="a-folder")

    def test_an_id_beyond_the_width(self, check):
        with pytest.raises(ExplanationError, match="highest feature id") as caught:
            check(index=str(D_SAE))
        assert caught.value.found == D_SAE

    @pytest.mark.parametrize("width", [63, 100, 20_000])
    def test_a_width_in_the_name(self, write, width):
        path = write("a.jsonl", lines([row | {"layer": "2-gemmascope-res-16k"} for row in neuronpedia()]))
        read_explanations(path).check(make_sae("relu", d_sae=16_384), LAYER, MODEL)
        with pytest.raises(ExplanationError, match="width in the name"):
            read_explanations(path).check(make_sae("relu", d_sae=width), LAYER, MODEL)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer": 1}, "layer in the explanations"),
            ({"model": "google/gemma-2-2b"}, "model in the explanations"),
            ({"index": str(D_SAE)}, "highest feature id"),
        ],
    )
    def test_another_layer_or_model(self, check, changes, message):
        with pytest.raises(ExplanationError, match=message):
            check(**changes)

    def test_a_model_that_was_trained_on_is_still_that_model(self, check):
        check(model="owner/Tiny_Llama-1B-Instruct")

    def test_another_place(self, write):
        path = write("a.jsonl", lines([row | {"layer": "2-gemmascope-mlp-x"} for row in neuronpedia()]))
        with pytest.raises(ExplanationError, match="place in the name"):
            read_explanations(path).check(make_sae("relu"), LAYER, MODEL)

    def test_the_name_that_the_sae_has_on_neuronpedia(self, check):
        sae = make_sae("relu")
        check(replace(sae, metadata={"neuronpedia_id": "tiny-llama-1b/2-someone-res"}))
        with pytest.raises(ExplanationError, match="SAE on Neuronpedia"):
            check(replace(sae, metadata={"neuronpedia_id": "tiny-llama-1b/2-another-res"}))

    def test_our_own_files_name_the_sae_exactly(self, write):
        one, other = make_sae("relu"), make_sae("relu", seed=1)
        row = {"feature": 3, "description": "planets", "sae": one.fingerprint(), "layer": LAYER, "model": MODEL}
        found = read_explanations(write("a.jsonl", lines([row])))
        found.check(one, LAYER, MODEL)
        with pytest.raises(ExplanationError, match="fingerprint"):
            found.check(other, LAYER, MODEL)


def test_the_explanations_of_the_package_are_of_its_sae():
    sae, found = embedded_sae(), read_explanations(EXPLANATIONS)
    found.check(sae, EMBEDDED_LAYER, HUB_ID)
    assert (found.empty, found.repeated) == (0, 0)
    assert len({row.feature for row in found.rows}) == sae.d_sae
    assert EXPLANATIONS.stat().st_size < 600_000
    assert len(by_words(found.rows, "planets, stars and space")) >= 40

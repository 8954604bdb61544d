"""Given features in place of selection, with and without forget text: the promise, the artifact, and what it says."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from chat_server import serving
from conftest import D_SAE, make_sae
from saeguard import Guardrail, errors, fit
from saeguard.card import model_card
from saeguard.choices import GivenFeatures
from saeguard.cli.main import main
from saeguard.config import PRESETS
from saeguard.explain.explanations import Explanation, Explanations, read_explanations
from saeguard.explain.matching import by_words, given
from saeguard.gate import Cusum, Evidence, Mean
from saeguard.gates import rarity
from saeguard.report import print_report
from saeguard.report.page import render_page
from saeguard.sae.slim import slim
from saeguard.sample import read_windows
from topics import LAYER, SMALL, corpora, passages, save_all

UNMEASURED = "not measured: no forget text"
ABOUT = Explanations("a.jsonl", "ab" * 32, (Explanation(3, "planets"), Explanation(9, "planets, moons")), 0, 0)


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu")


@pytest.fixture(scope="module")
def topical(llama, tokenizer, sae) -> GivenFeatures:
    """The features that selection with forget text takes, as somebody would give them who knows them."""
    forget, retain = corpora()
    chosen = fit(llama, tokenizer, sae, layer=LAYER, forget=forget, retain=retain, config=SMALL).features
    return GivenFeatures(chosen)


@pytest.fixture
def run(llama, tokenizer, sae):
    def run(features, config=SMALL, *, forget=None, retain=None) -> Guardrail:
        config = replace(config, given=features)
        retain = retain or corpora()[1]
        return fit(llama, tokenizer, sae, layer=LAYER, forget=forget, retain=retain, config=config)

    return run


class TestWithoutForgetText:
    def test_what_needs_it_is_absent(self, run, topical):
        found = run(topical)
        evidence = found.evidence
        assert found.features == topical.ids
        assert set(evidence["gates"]) == {"density", "evidence"}
        for figures in evidence["gates"].values():
            assert [figures[key] for key in ("caught", "caught_in_calibration", "delay_in_calibration", "auroc")] == [
                None
            ] * 4
            assert all(row["caught"] is None for row in figures["by_length"].values())
            assert set(figures["false_positives"]) == {"kitchen", "garden"}
        assert evidence["contamination"] is None
        assert set(evidence["corpora"]) == {"kitchen", "garden"}
        for feature in found.rule.selected:
            assert (feature.forget_score, feature.ratio, feature.explanation) == (None, None, None)
            assert set(feature.firing_rates) == {"kitchen", "garden"}

    @pytest.mark.parametrize("gate", ["evidence", "density"])
    def test_it_saves_loads_and_serves_the_same_verdicts(self, run, topical, llama, tokenizer, tmp_path, gate):
        fitted = run(topical, replace(SMALL, gate=gate))
        loaded = Guardrail.from_pretrained(fitted.save_pretrained(tmp_path / "guard"))
        assert loaded.rule.selected == fitted.rule.selected
        assert loaded.evidence == json.loads(json.dumps(fitted.evidence))
        rows = [
            torch.tensor([tokenizer(text)["input_ids"]]) for text in (*passages("forget", 8, seed=3), "milen tarno")
        ]
        verdicts = []
        for guardrail in (fitted, loaded):
            with guardrail.attach(llama, tokenizer) as guard:
                verdicts.append([guard.judge(row)[0] for row in rows])
        assert verdicts[0] == verdicts[1]

    def test_the_statistic_is_higher_on_the_topic(self, run, topical, llama, tokenizer):
        with run(topical).attach(llama, tokenizer) as guard:
            typical = {
                name: median(guard.judge(torch.tensor([tokenizer(text)["input_ids"]]))[0].statistic for text in texts)
                for name, texts in ((name, passages(name, 40, seed=1)) for name in ("forget", "kitchen"))
            }
        assert typical["forget"] > 1.2 * typical["kitchen"]

    def test_the_promise_holds_on_new_retain_text(self, run, topical, llama, tokenizer):
        """Over many new passages of each corpus, no more trigger than alpha allows, within three deviations."""
        alpha, new = SMALL.alpha, 150
        retain = {name: passages(name, 120, seed=7) for name in ("kitchen", "garden")}
        with run(topical, retain=retain).attach(llama, tokenizer) as guard:
            for name in retain:
                texts = passages(name, new, seed=8)
                hits = sum(guard.judge(torch.tensor([tokenizer(text)["input_ids"]]))[0].triggered for text in texts)
                calibration_noise = (alpha * (1 - alpha) / 36) ** 0.5
                assert hits / new <= alpha + 3 * ((alpha * (1 - alpha) / new) ** 0.5 + calibration_noise)

    def test_the_drift_is_what_the_mean_would_have_as_its_threshold(self, run, topical):
        found = run(topical, replace(SMALL, gate="density"))
        assert isinstance(found.gate.accumulator, Cusum)
        assert 0 <= found.gate.accumulator.drift < 1
        averaged = run(topical, replace(SMALL, gate="density", accumulate="mean"))
        assert averaged.gate.accumulator == Mean()

    def test_the_preset_of_the_paper_works_too(self, run, topical):
        found = run(topical, replace(PRESETS["paper"], lengths=(24,)))
        assert (found.gate.kind, found.gate.accumulator, found.clamp.c) == ("density", Mean(), 500.0)
        assert found.evidence["gates"]["density"]["caught"] is None

    def test_nothing_is_known_of_the_topic(self, run, topical):
        with pytest.raises(errors.CorpusError, match="gate probe is learned from forget text"):
            run(topical, replace(SMALL, gate="probe"))
        with pytest.raises(errors.CorpusError, match="units of the topic's mean score"):
            run(topical, replace(SMALL, drift=1.0))
        with pytest.raises(errors.CorpusError, match="no forget text and no features"):
            run(None)


def test_rarity_against_a_loop(llama, tokenizer, sae, tmp_path):
    from saeguard.corpus import Corpus
    from saeguard.shards import Pass, run_pass
    from saeguard.windows import Windower

    ids = [3, 9, 27]
    texts = {name: Corpus.of(name, "retain", its) for name, its in corpora()[1].items()}
    task = Pass(llama, tokenizer, sae, LAYER, Windower(tokenizer, SMALL.lengths), SMALL.sample)
    done = run_pass(task, texts, {name: c.summary() for name, c in texts.items()}, tmp_path, lambda tokens: None)
    windows = read_windows([shard for its in done.values() for shard in its], slim(sae, ids))
    found = rarity(windows)
    for column, weight in enumerate(found.weights.tolist()):
        rates = []
        for name in texts:
            own = [w for w in windows if w.corpus == name]
            fired = sum(int((w.activations[w.masks.valid[0], column] > 0).sum()) for w in own)
            rates.append((fired + 1) / (sum(int(w.masks.valid.sum()) for w in own) + 2))
        assert weight == pytest.approx(-float(torch.tensor(max(rates)).log()), rel=1e-5)
        assert weight > 0
    assert isinstance(found, Evidence)


class TestWithForgetText:
    def test_given_features_take_the_place_of_selection_alone(self, run, topical):
        forget, _ = corpora()
        odd = GivenFeatures((5, *topical.ids[:2]))
        found = run(odd, forget=forget)
        assert found.features == odd.ids
        assert set(found.evidence["gates"]) == {"density", "evidence", "probe"}
        assert found.evidence["gates"]["evidence"]["caught"]["n"] == 8
        assert found.evidence["contamination"] is not None
        assert all(feature.ratio is not None for feature in found.rule.selected)

    def test_the_features_that_selection_takes_give_the_same_guardrail(self, run, topical):
        forget, _ = corpora()
        selected, told = run(None, forget=forget), run(topical, forget=forget)
        assert (told.features, told.threshold) == (selected.features, selected.threshold)
        assert (selected.evidence["given"], told.evidence["given"]) == (None, {"by": "ids"})


class TestBadIds:
    @pytest.mark.parametrize("ids", [(D_SAE,), (3, -1), (3, 10_000)])
    def test_ids_of_another_sae(self, run, ids):
        with pytest.raises(errors.SelectionError, match=f"expected 0 to {D_SAE - 1}"):
            run(GivenFeatures(ids))

    @pytest.mark.parametrize("ids", [(), (3, 3)])
    def test_none_or_one_twice(self, run, ids):
        with pytest.raises(errors.SelectionError, match="expected at least one, and each of them once"):
            run(GivenFeatures(ids))


@pytest.fixture(scope="module")
def explained(llama, tokenizer, sae) -> Guardrail:
    config = replace(SMALL, given=given(by_words(ABOUT.rows, "planets"), ABOUT, "planets", "words"))
    return fit(llama, tokenizer, sae, layer=LAYER, retain=corpora()[1], config=config)


class TestReports:
    def test_the_record(self, explained):
        assert [(f.id, f.explanation) for f in explained.rule.selected] == [(3, "planets"), (9, "planets, moons")]
        found = explained.evidence["given"]
        assert (found["about"], found["file"], found["sha256"]) == ("planets", "a.jsonl", ABOUT.sha256)

    def test_the_terminal_the_page_and_the_card(self, explained):
        buffer = io.StringIO()
        print_report(explained, Console(file=buffer, width=240, color_system=None))
        for text in (buffer.getvalue(), render_page(explained)):
            assert UNMEASURED in text
            assert "planets, moons" in text
            assert "about “planets”" in text
        assert UNMEASURED in model_card(explained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer, sae):
    folder = tmp_path_factory.mktemp("zero")
    command = save_all(folder, llama, tokenizer, sae)
    place = command.index("--forget")
    return folder, command[:place] + command[place + 2 :]


@pytest.fixture(scope="module")
def explanations(folder):
    path, (home, _) = folder[0] / "explanations.jsonl", folder
    texts = [f"{name}={home / name}.jsonl" for name in ("forget", "kitchen", "garden")]
    model = ["--model", home / "model", "--sae", home / "sae", "--dtype", "float32", "--device", "cpu"]
    assert main(["explain", *map(str, model), "--text", *texts, "--out", str(path), "--json"]) == 0
    return path


class TestCommand:
    @pytest.fixture
    def saeguard(self, folder, capsys, tmp_path):
        def run(*words):
            try:
                status = main([*folder[1], "--out", str(tmp_path / "guard"), *map(str, words)])
            except SystemExit as stop:
                status = int(stop.code or 0)
            return status, *capsys.readouterr()

        return run

    def test_ids(self, saeguard, tmp_path):
        status, out, _ = saeguard("--features", "3, 9,27", "--json")
        assert (status, json.loads(out)["features"], json.loads(out)["caught"]) == (0, [3, 9, 27], None)
        assert Guardrail.from_pretrained(tmp_path / "guard").evidence["given"] == {"by": "ids"}

    def test_from_explain_to_a_guardrail(self, saeguard, explanations, tmp_path):
        status, out, err = saeguard("--explanations", explanations, "--about", "zorb quax vexil jyx kwoz", "--yes")
        assert status == 0, err
        assert "features that match" in out
        found = Guardrail.from_pretrained(tmp_path / "guard")
        assert len(found.features) <= SMALL.n
        assert all(feature.explanation for feature in found.rule.selected)

    def test_without_a_terminal_it_shows_and_stops(self, saeguard, explanations, tmp_path):
        status, out, err = saeguard("--explanations", explanations, "--about", "zorb")
        assert (status, "explanation" in out, "say --yes" in err) == (2, True, True)
        status, out, err = saeguard("--explanations", explanations, "--about", "zorb", "--json")
        assert (status, set(json.loads(out)["matches"][0])) == (2, {"feature", "score", "text"})
        assert not (tmp_path / "guard").exists()

    @pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 2), ("", 2)])
    def test_on_a_terminal_it_asks(self, saeguard, explanations, monkeypatch, answer, status):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: answer)
        assert saeguard("--explanations", explanations, "--about", "zorb")[0] == status

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "what should be forgotten"),
            (["--features", "3,x"], "ids with commas"),
            (["--features", "3", "--about", "planets"], "give one of them"),
            (["--features", "3", "--semantic", "m"], "need --about"),
            (["--about", "planets"], "--explanations is needed"),
        ],
    )
    def test_wrong_use(self, saeguard, words, message):
        status, _, err = saeguard(*words)
        assert (status, message in err) == (2, True), err

    def test_words_that_nothing_is_about(self, saeguard, explanations):
        status, _, err = saeguard("--explanations", explanations, "--about", "submarines")
        assert (status, "try other words" in err) == (2, True)

    def test_explanations_of_another_sae(self, saeguard, explanations, tmp_path):
        rows = [json.loads(line) for line in explanations.read_text("utf-8").splitlines()]
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps(row | {"sae": "0" * 16}) + "\n" for row in rows), "utf-8")
        status, _, err = saeguard("--explanations", other, "--about", "zorb", "--yes")
        assert (status, "ExplanationError: fingerprint" in err) == (1, True)

    def test_explain_asks_a_language_model_about_some(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("THE_KEY", "secret")
        home, out = folder[0], tmp_path / "described.jsonl.gz"
        model = ["--model", home / "model", "--sae", home / "sae", "--dtype", "float32", "--device", "cpu"]
        with serving() as server:
            asking = ["--describe-with", server.url, "--describe-model", "a-model", "--api-key-env", "THE_KEY"]
            command = [
                "explain",
                *model,
                "--text",
                f"kitchen={home / 'kitchen.jsonl'}",
                "--out",
                out,
                *asking,
                "--json",
            ]
            assert main([str(word) for word in [*command, "--limit", 3]]) == 0
            assert json.loads(capsys.readouterr().out)["described"] == 3
            assert main([str(word) for word in [*command, "--limit", 5]]) == 0
        assert len(server.asked) == 5
        assert set(server.keys) == {"Bearer secret"}
        rows = read_explanations(out).rows
        assert sum(row.by == "a-model" for row in rows) <= 5
        assert {row.by for row in rows} == {"a-model", "words"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--describe-with", "http://x/v1"], "belong together"),
            (["--api-key-env", "NOT_SET_ANYWHERE"], "is not set"),
            (["--peaks", "0"], "at least 1"),
        ],
    )
    def test_wrong_use_of_explain(self, tmp_path, capsys, words, message):
        assert main(["explain", "--text", "a=a.txt", "--out", str(tmp_path / "x.jsonl"), *words]) == 2
        assert message in capsys.readouterr().err

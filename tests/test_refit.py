"""`refit` and the drift it measures: nothing changes on the same model; on a changed one the promise holds again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from conftest import make_guardrail, make_model, make_sae, make_tokenizer
from saeguard import Guardrail, errors, fit, merge
from saeguard.calibration import rate_above
from saeguard.choices import GivenFeatures
from saeguard.cli.main import main
from saeguard.config import FitConfig, RefitConfig
from saeguard.corpus import Corpus
from saeguard.doctor.reading import Subject
from saeguard.refit import refit
from topics import LAYER, SMALL, corpora, save_all

KEEP = RefitConfig(only="threshold")
FORGET, RETAIN = corpora()


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu")


@pytest.fixture(scope="module")
def fitted(llama, tokenizer, sae) -> Guardrail:
    return fit(llama, tokenizer, sae, layer=LAYER, forget=FORGET, retain=RETAIN, config=SMALL)


@pytest.fixture(scope="module")
def moved(llama) -> Callable[[float], PreTrainedModel]:
    """The model with noise on all weights, of so many of their standard deviations."""

    def moved(noise: float) -> PreTrainedModel:
        model = copy.deepcopy(llama)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.std() if parameter.ndim > 1 else 0.0
                parameter += noise * spread * torch.randn(parameter.shape, generator=generator)
        return model

    return moved


@pytest.fixture
def again(fitted, tokenizer, sae):
    """`refit` on a model, with the texts of the fit."""

    def again(model: PreTrainedModel, guardrail: Guardrail = fitted, **changes) -> Guardrail:
        return refit(guardrail, Subject(model, tokenizer, sae, LAYER), **{"forget": FORGET, "retain": RETAIN} | changes)

    return again


def drift_of(guardrail: Guardrail) -> dict:
    return dict(guardrail.evidence["refit"]["drift"])


class TestOnTheSameModel:
    def test_the_guardrail_is_the_same(self, again, fitted, llama):
        found = again(llama)
        assert (found.rule.selected, found.threshold, found.clamp) == (
            fitted.rule.selected, fitted.threshold, fitted.clamp,
        )  # fmt: skip
        assert found.gate.accumulator == fitted.gate.accumulator
        assert torch.equal(found.gate.scorer.weights, fitted.gate.scorer.weights)
        assert torch.equal(found.rule.encoder.columns, fitted.rule.encoder.columns)
        assert {key: its for key, its in found.evidence.items() if key != "refit"} == fitted.evidence

    def test_the_threshold_alone_is_the_same(self, again, fitted, llama):
        found = again(llama, config=KEEP)
        assert (found.features, found.threshold, found.clamp) == (fitted.features, fitted.threshold, fitted.clamp)
        assert found.evidence["config"] == fitted.evidence["config"]
        chosen = fitted.evidence["chosen"]
        assert found.evidence["gates"] == {chosen: fitted.evidence["gates"][chosen]}

    def test_nothing_drifted(self, again, fitted, llama):
        drift = drift_of(again(llama))
        assert list(drift) == ["forget", "kitchen", "garden"]
        figures = fitted.evidence["gates"][fitted.evidence["chosen"]]
        for name, its in drift.items():
            assert (its["agreement"], its["shift"], its["same_text"]) == (1.0, 0.0, True)
            rate = figures["caught"] if name == "forget" else figures["false_positives"][name]
            assert its["triggered"] == {"then": rate, "now": rate}

    def test_also_from_the_folder_it_was_saved_in(self, again, fitted, llama, tmp_path):
        read = Guardrail.from_pretrained(fitted.save_pretrained(tmp_path / "old"))
        found = Guardrail.from_pretrained(again(llama, read).save_pretrained(tmp_path / "new"))
        assert (found.features, found.threshold) == (fitted.features, fitted.threshold)
        assert all(its["agreement"] == 1.0 for its in drift_of(found).values())

    def test_given_features_stay_given(self, again, llama, tokenizer, sae):
        given = GivenFeatures((5, 9, 2), {9: "of nine"})
        old = fit(llama, tokenizer, sae, layer=LAYER, retain=RETAIN, config=replace(SMALL, given=given))
        found = again(llama, old, forget=None)
        assert (found.rule.selected, found.threshold) == (old.rule.selected, old.threshold)
        assert found.evidence["given"] == old.evidence["given"]

    def test_topk_thresholds_are_kept_with_the_features(self, again, llama, tokenizer):
        sae = make_sae("topk")
        config = replace(SMALL, topk="threshold", gate="evidence")
        old = fit(llama, tokenizer, sae, layer=LAYER, forget=FORGET, retain=RETAIN, config=config)
        found = refit(old, Subject(llama, tokenizer, sae, LAYER), forget=FORGET, retain=RETAIN, config=KEEP)
        assert torch.equal(found.rule.encoder.threshold, old.rule.encoder.threshold)
        assert (found.threshold, found.evidence["topk"]) == (old.threshold, old.evidence["topk"])


class TestOnAChangedModel:
    @pytest.mark.parametrize("config", [RefitConfig(), KEEP])
    def test_the_old_is_refused_and_the_new_attaches(self, again, fitted, moved, tokenizer, config):
        model = moved(0.1)
        with pytest.raises(errors.ArtifactMismatchError, match=r"weights .* expected .*`saeguard refit`"):
            fitted.check(model, tokenizer)
        found = again(model, config=config)
        assert found.model["weights"] != fitted.model["weights"]
        assert found.evidence["refit"]["model"] == fitted.model
        proof = found.evidence["proof"]
        with found.attach(model, tokenizer) as guard:
            read = [torch.tensor([tokenizer(proof[name])["input_ids"]]) for name in ("fires", "silent")]
            assert [guard.judge(ids)[0].triggered for ids in read] == [True, False]

    @pytest.mark.parametrize("config", [RefitConfig(), KEEP])
    def test_calibration_text_keeps_the_promise(self, again, moved, tokenizer, config):
        model = moved(0.2)
        found = again(model, config=config)
        outliers = {(s["corpus"], s["document"]) for s in found.evidence["contamination"]["listed"] if s["outlier"]}
        with found.attach(model, tokenizer) as guard:
            for name, texts in RETAIN.items():
                read = [
                    guard.judge(torch.tensor([tokenizer(document.text)["input_ids"]]))[0].statistic
                    for document in Corpus.of(name, "retain", texts).documents()
                    if document.split == "calibration" and (name, document.index) not in outliers
                ]
                assert rate_above(read, found.threshold).value <= SMALL.alpha

    def test_the_threshold_alone_keeps_the_rest(self, again, fitted, moved):
        found = again(moved(0.2), config=KEEP)
        assert found.threshold != fitted.threshold
        assert (found.features, found.gate.accumulator, found.clamp.c) == (
            fitted.features, fitted.gate.accumulator, fitted.clamp.c,
        )  # fmt: skip
        assert torch.equal(found.gate.scorer.weights, fitted.gate.scorer.weights)
        assert found.evidence["refit"]["features_kept"] == len(fitted.features)
        assert found.evidence["config"] == fitted.evidence["config"]

    def test_the_threshold_alone_needs_no_forget_text(self, again, fitted, moved):
        model = moved(0.1)
        found = again(model, config=KEEP, forget=None)
        assert found.features == fitted.features
        assert set(drift_of(found)) == {"kitchen", "garden"}
        assert found.evidence["gates"][found.evidence["chosen"]]["caught"] is None

    def test_drift_grows_with_the_change(self, again, moved):
        drifts = [drift_of(again(moved(noise), config=KEEP)) for noise in (0.0, 0.02, 0.1, 0.5)]
        for name in ("forget", "kitchen", "garden"):
            agreement, shift = ([drift[name][figure] for drift in drifts] for figure in ("agreement", "shift"))
            assert (agreement[0], shift[0]) == (1.0, 0.0)
            assert agreement == sorted(agreement, reverse=True)
            assert agreement[-1] < agreement[1]
            assert shift[-1] > shift[1] > 0

    def test_a_refitted_guardrail_can_be_refitted(self, again, fitted, moved, llama):
        back = again(llama, again(moved(0.1), config=KEEP))
        assert (back.features, back.threshold) == (fitted.features, fitted.threshold)

    def test_other_text_is_said_to_be_other(self, again, llama):
        drift = drift_of(again(llama, retain={"kitchen": RETAIN["kitchen"], "garden": corpora(50)[1]["garden"]}))
        assert [its["same_text"] for its in drift.values()] == [True, True, False]


class TestRefusals:
    def test_a_model_of_another_kind(self, again):
        with pytest.raises(errors.ArtifactMismatchError, match="config of the model"):
            again(make_model("gpt2"))

    def test_another_tokenizer(self, fitted, llama, sae):
        subject = Subject(llama, make_tokenizer(chat=False), sae, LAYER)
        with pytest.raises(errors.ArtifactMismatchError, match="tokenizer"):
            refit(fitted, subject, forget=FORGET, retain=RETAIN)

    def test_another_sae_or_layer(self, fitted, llama, tokenizer, sae):
        for subject in (
            Subject(llama, tokenizer, make_sae("jumprelu", seed=1), LAYER),
            Subject(llama, tokenizer, sae, LAYER - 1),
        ):
            with pytest.raises(errors.SAEMismatchError, match="Give the SAE"):
                refit(fitted, subject, forget=FORGET, retain=RETAIN)

    def test_several_rules(self, again, fitted, llama):
        second = replace(fitted, rules=(replace(fitted.rule, name="second"),))
        with pytest.raises(errors.ArtifactError, match=r"rules of the guardrail: found 2, expected 1"):
            again(llama, merge([fitted, second]))

    def test_a_guardrail_that_records_no_settings(self, again, llama, tokenizer, sae):
        with pytest.raises(errors.ArtifactError, match=r"found none"):
            again(llama, make_guardrail(llama, tokenizer, sae, LAYER))

    def test_settings_of_another_version(self, again, fitted, llama):
        evidence = {**fitted.evidence, "config": {**fitted.evidence["config"], "unheard_of": 1}}
        with pytest.raises(errors.ArtifactError, match=r"unknown ones, unheard_of"):
            again(llama, replace(fitted, rules=(replace(fitted.rule, evidence=evidence),)))

    def test_no_forget_text_to_select_by(self, again, llama):
        with pytest.raises(errors.CorpusError, match="no forget text"):
            again(llama, forget=None)

    def test_an_sae_that_no_longer_fits_unless_forced(self, fitted, llama, tokenizer, sae):
        evidence = {**fitted.evidence, "config": {**fitted.evidence["config"], "force": False}}
        strict = replace(fitted, rules=(replace(fitted.rule, evidence=evidence),))
        subject = Subject(llama, tokenizer, replace(sae, metadata={"layer": 1}), LAYER)
        with pytest.raises(errors.SAEMismatchError, match="--force"):
            refit(strict, subject, forget=FORGET, retain=RETAIN)
        found = refit(strict, subject, forget=FORGET, retain=RETAIN, config=RefitConfig(force=True))
        assert found.evidence["doctor"]["forced"]


def test_the_settings_come_back_from_the_artifact():
    assert FitConfig(**{**SMALL.as_dict(), "lengths": tuple(SMALL.as_dict()["lengths"])}) == SMALL
    assert json.loads(json.dumps(SMALL.as_dict())) == SMALL.as_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer, sae, moved) -> Path:
    folder = tmp_path_factory.mktemp("refit")
    command = save_all(folder, llama, tokenizer, sae)
    assert main([*command, "--out", str(folder / "guard")]) == 0
    moved(0.1).save_pretrained(folder / "changed")
    tokenizer.save_pretrained(folder / "changed")
    return folder


class TestCommand:
    def command(self, folder: Path, *words: str) -> int:
        retain = [f"{name}={folder / name}.jsonl" for name in RETAIN]
        return main([
            "refit", str(folder / "guard"), "--model", str(folder / "changed"), "--sae", str(folder / "sae"),
            "--dtype", "float32", "--device", "cpu", "--retain", *retain, "--out", str(folder / "new"), *words,
        ])  # fmt: skip

    def test_it_prints_the_drift(self, folder, capsys):
        assert self.command(folder, "--forget", str(folder / "forget.jsonl")) == 0
        said = capsys.readouterr().out
        assert "How far the model moved" in said
        assert all(name in said for name in ("forget", "kitchen", "garden"))
        assert drift_of(Guardrail.from_pretrained(folder / "new"))["kitchen"]["agreement"] < 1

    def test_it_prints_json(self, folder, capsys):
        capsys.readouterr()
        assert self.command(folder, "--only", "threshold", "--json") == 0
        said = json.loads(capsys.readouterr().out)
        old = Guardrail.from_pretrained(folder / "guard")
        new = Guardrail.from_pretrained(folder / "new")
        assert (said["features"], said["threshold"]) == (list(old.features), new.threshold)
        assert (said["refit"]["only"], said["refit"]["threshold"]) == ("threshold", old.threshold)
        assert set(said["refit"]["drift"]) == {"kitchen", "garden"}

    def test_the_old_guardrail_is_refused_with_advice(self, folder, capsys):
        words = ["generate", "--guardrail", str(folder / "guard"), "--model", str(folder / "changed"), "--dtype",
                 "float32", "--device", "cpu", "Hello"]  # fmt: skip
        assert main(words) == 1
        assert "run `saeguard refit`" in capsys.readouterr().err

    def test_wrong_use(self, folder, capsys):
        assert self.command(folder, "--retain", "no-name") == 2
        assert "NAME=FILE" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            main(["refit", str(folder / "guard"), "--out", "x"])
        assert stop.value.code == 2

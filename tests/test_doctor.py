"""The doctor on a tiny model with an SAE trained on it: intact it fits, and each damage gets its own finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import D_MODEL, make_model, make_sae
from saeguard import errors, fit
from saeguard.cli.main import main
from saeguard.config import SAETraining
from saeguard.corpus import Corpus
from saeguard.doctor import checks, declared
from saeguard.doctor.corrections import best_scale
from saeguard.doctor.diagnosis import Diagnosis, admit, diagnose
from saeguard.doctor.figures import Figures, Trial
from saeguard.doctor.finding import Finding, verdict_of
from saeguard.doctor.measure import rebuild, reconstruction
from saeguard.doctor.precision import overlap, precisions, selected_features
from saeguard.doctor.reading import Rows, Subject, read, sample_windows
from saeguard.report.view import facts
from saeguard.sae.autoencoder import JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats.saelens import save_saelens
from saeguard.sae.train import train
from topics import LAYER, SMALL, WORDS, corpora, passages

TRAINING = SAETraining(width=256, k=12, token_passes=400 * 512, batch=512, learning_rate=3e-3)
Damage = Callable[[SparseAutoencoder], SparseAutoencoder]


@pytest.fixture(scope="module")
def texts() -> list[Corpus]:
    return [Corpus.of(name, "retain", passages(name, 80, words=30)) for name in WORDS]


@pytest.fixture(scope="module")
def sae(llama, tokenizer, texts) -> SparseAutoencoder:
    """Trained on the very texts: what is asked here is whether damage is told from health."""
    subject = Subject(llama, tokenizer, make_sae("relu"), LAYER)
    windows = [window for its in sample_windows(tokenizer, texts, 12_000).values() for window in its]
    rows = read(subject, windows).rows[LAYER].x
    return replace(train(rows, TRAINING, metadata={}), metadata={})


@pytest.fixture(scope="module")
def examine(llama, tokenizer, texts, sae):
    """The diagnosis of an SAE, by default the intact one, at a layer."""

    def examine(sae=sae, layer: int = LAYER, *, model: PreTrainedModel = llama, **options: Any) -> Diagnosis:
        return diagnose(Subject(model, tokenizer, sae, layer), texts, **{"tokens": 2_000, "thorough": False, **options})

    return examine


@pytest.fixture(scope="module")
def intact(examine) -> Diagnosis:
    return examine(thorough=True)


@pytest.fixture(scope="module")
def healthy(intact) -> Figures:
    assert intact.figures is not None
    return intact.figures


def encoder(sae: SparseAutoencoder, order: torch.Tensor) -> SparseAutoencoder:
    return replace(
        sae, W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], activation=JumpReLU(sae.activation.threshold[order])
    )


def unfolded(factor: float) -> Damage:
    """As if the SAE had been trained on inputs times `factor`, and that were forgotten."""
    return lambda sae: replace(
        sae, b_enc=sae.b_enc * factor, b_dec=sae.b_dec * factor, activation=JumpReLU(sae.activation.threshold * factor)
    )


def input_bias(times: int) -> Damage:
    """As if b_dec had been subtracted from the input in training, and were not now (1), or the reverse (-1)."""
    return lambda sae: replace(sae, b_enc=sae.b_enc + times * sae.b_dec @ sae.W_enc)


def shuffled(sae: SparseAutoencoder) -> SparseAutoencoder:
    return encoder(sae, torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0)))


def turned(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE in other coordinates, as that of another model of this width is."""
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0)))[0]
    return replace(sae, W_enc=turn.T @ sae.W_enc, W_dec=sae.W_dec @ turn, b_dec=sae.b_dec @ turn)


class TestDiagnosis:
    def test_an_sae_of_this_model_and_layer_fits(self, intact):
        assert intact.verdict == "fits"
        assert intact.mismatch is None

    @pytest.mark.parametrize("factor", [0.1, 0.3, 3.0, 10.0])
    def test_unfolded_normalisation(self, examine, sae, factor):
        found = examine(unfolded(factor)(sae))
        assert found.verdict == "does not fit"
        assert found.mismatch.what == "scale of the SAE's input"
        assert found.figures.corrections.scale.value == pytest.approx(factor, rel=0.2)

    @pytest.mark.parametrize(("times", "said"), [(1, "with b_dec subtracted"), (-1, "with b_dec not subtracted")])
    def test_b_dec_at_the_input(self, examine, sae, times, said):
        found = examine(input_bias(times)(sae))
        assert (found.verdict, found.mismatch.what) == ("does not fit", "b_dec at the SAE's input")
        assert said in found.mismatch.found

    def test_a_shuffled_encoder(self, examine, sae):
        found = examine(shuffled(sae))
        assert (found.verdict, found.mismatch.what) == ("does not fit", "encoder and decoder")

    def test_another_model_of_this_width(self, examine, sae):
        assert examine(turned(sae)).verdict == "does not fit"

    @pytest.mark.parametrize("layer", [LAYER - 1, LAYER + 1])
    def test_a_layer_that_the_file_does_not_tell(self, examine, layer):
        found = examine(layer=layer)
        assert (found.verdict, found.mismatch.what) == ("does not fit", "layer that explains most")
        assert found.figures.corrections.layer.value == LAYER

    def test_a_layer_that_the_file_tells(self, examine, sae):
        found = examine(replace(sae, metadata={"layer": 1}))
        assert found.mismatch == Finding("mismatch", "layer", "2", "1, on which the SAE was trained", "Use layer 1.")

    def test_an_sae_of_another_width_is_not_run(self, examine):
        found = examine(make_sae("relu", d_model=48))
        assert (found.verdict, found.figures, found.mismatch.found) == ("does not fit", None, "48")

    def test_a_layer_that_the_model_lacks(self, examine):
        with pytest.raises(errors.LayerError):
            examine(layer=7)

    @pytest.mark.parametrize(
        ("hook", "hook_out"), [("mlp_out", "mlp_out"), ("resid_pre", "resid_pre"), ("mlp_in", "mlp_out")]
    )
    @pytest.mark.parametrize("activation", ["relu", "topk"])
    def test_other_hook_points_and_activations_are_examined_too(self, examine, activation, hook, hook_out):
        sae = replace(make_sae(activation), metadata={"hook": hook, "hook_out": hook_out})
        found = examine(sae, thorough=True)
        assert found.figures.loss_recovered is None
        assert (found.figures.features.alignment is None) == (hook != hook_out)
        assert len(found.figures.precision) == 1

    def test_no_text(self, llama, tokenizer, sae):
        with pytest.raises(errors.TooFewSequencesError, match="found 1, expected at least 64"):
            diagnose(Subject(llama, tokenizer, sae, LAYER), [Corpus.of("blank", "retain", ["a"])])

    def test_it_is_plain_json_and_the_same_again(self, examine):
        first, second = (examine().as_dict() for _ in range(2))
        assert first == second == json.loads(json.dumps(first, allow_nan=False))
        assert set(first["figures"]["texts"]) == set(WORDS)


class TestMeasures:
    def test_figures_are_those_of_the_formulas(self, llama, tokenizer, texts, sae):
        windows = [window for its in sample_windows(tokenizer, texts, 900).values() for window in its]
        rows = read(Subject(llama, tokenizer, sae, LAYER), windows).rows[LAYER]
        parts = [rebuild(sae, rows[:300]), rebuild(sae, rows[300:])]
        found = reconstruction(parts, bound=float("inf"))
        h, a = rows.x, sae.encode(rows.x)
        left = (h - sae.decode(a)).square().sum() / (h - h.mean(dim=0)).square().sum()
        assert found.explained_variance == pytest.approx(1 - float(left), rel=1e-4)
        assert found.ordinary == found.explained_variance
        assert found.l0 == pytest.approx(float((a > 0).sum(dim=1).float().mean()))
        assert found.tokens == len(h) == parts[0].statistics.count + parts[1].statistics.count

    def test_massive_tokens_flatter_and_the_ordinary_figure_does_not(self, sae):
        generator = torch.Generator().manual_seed(0)
        plain = torch.randn(200, D_MODEL, generator=generator)
        massive = torch.zeros(4, D_MODEL)
        massive[:, 3] = torch.tensor([400.0, 420.0, 440.0, 460.0])
        column = torch.eye(D_MODEL)[:, 3:4].contiguous()
        one = SparseAutoencoder(column, torch.zeros(1), column.T.contiguous(), torch.zeros(D_MODEL), ReLU())
        found = reconstruction([rebuild(one, Rows(*[torch.cat([plain, massive])] * 2))], bound=20.0)
        assert found.explained_variance > 0.95
        assert found.ordinary < 0.1

    def test_the_best_scale_is_found_over_six_decades(self, sae, llama, tokenizer, texts):
        windows = sample_windows(tokenizer, texts, 600)["kitchen"]
        rows = read(Subject(llama, tokenizer, sae, LAYER), windows).rows[LAYER]
        for scale in (1e-3, 0.02, 1.0, 7.0, 1e3):
            as_is = Trial("none", 1.0, -1e9, 0.0)
            assert best_scale(unfolded(scale)(sae), rows, as_is).value == pytest.approx(scale, rel=0.25)

    def test_overlap(self):
        a, b = torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 1, 0, 1])
        assert overlap(a, b) == 0.5
        assert overlap(a, a) == overlap(a * 0, a * 0) == 1.0

    def test_float32_and_bfloat16_fire_alike_but_not_the_same(self, healthy):
        (one,) = healthy.precision
        assert (one.dtype, one.other) == ("float32", "bfloat16")
        assert 0.8 < one.jaccard < 1
        assert 0.8 < one.weighted < 1
        assert one.selected is not None

    def test_a_model_in_two_dtypes_is_not_compared(self, tokenizer, texts, sae):
        mixed = make_model("llama")
        mixed.lm_head.to(torch.bfloat16)
        windows = sample_windows(tokenizer, texts, 300)["kitchen"]
        assert precisions(Subject(mixed, tokenizer, sae, LAYER), windows, {}) == ()

    def test_one_text_selects_nothing(self, llama, tokenizer, texts, sae):
        windows = sample_windows(tokenizer, texts, 300)["kitchen"]
        statistics = rebuild(sae, read(Subject(llama, tokenizer, sae, LAYER), windows).rows[LAYER]).statistics
        assert selected_features({"kitchen": statistics}) == []


class TestChecks:
    """Each check is silent on the healthy figures and speaks on the changed ones."""

    @pytest.mark.parametrize(
        ("check", "level", "change"),
        [
            (checks.explained, "mismatch", lambda f: {"whole": replace(f.whole, ordinary=-0.1)}),
            (checks.explained, "warning", lambda f: {"whole": replace(f.whole, ordinary=0.4)}),
            (checks.explained_in_each, "warning",
             lambda f: {"texts": {**f.texts, "odd": replace(f.whole, ordinary=-1.0)}}),
            (checks.alignment, "mismatch", lambda f: {"features": replace(f.features, aligned=0.02)}),
            (checks.declared_l0, "warning", lambda f: {"declared_l0": 3 * f.whole.l0}),
            (checks.declared_l0, "warning", lambda f: {"declared_l0": f.whole.l0 / 3}),
            (checks.crowded, "warning", lambda f: {"features": replace(f.features, dense=0.3)}),
            (checks.crowded, "warning", lambda f: {"whole": replace(f.whole, l0=0.5 * f.features.d_sae)}),
            (checks.silent, "warning", lambda f: {"features": replace(f.features, silent=0.95)}),
            (checks.chat, "warning", lambda f: {"chat": replace(f.whole, ordinary=f.whole.ordinary - 0.2)}),
            (checks.loss_recovered, "warning", lambda f: {"loss_recovered": 0.5}),
            (checks.precision, "warning", lambda f: {"precision": (replace(f.precision[0], jaccard=0.5),)}),
            (checks.few_tokens, "note", lambda f: {"whole": replace(f.whole, tokens=300)}),
            (checks.massive, "note", lambda f: {"norms": replace(f.norms, massive_variance=0.6)}),
            (checks.massive, "note", lambda f: {"norms": replace(f.norms, massive_dimensions={7: 0.6})}),
            (checks.loud_tokens, "note", lambda f: {"norms": replace(f.norms, special=9 * f.norms.median)}),
        ],
    )  # fmt: skip
    def test_it_speaks(self, healthy, check, level, change):
        assert check(healthy) is None
        finding = check(replace(healthy, **change(healthy)))
        assert finding.level == level
        assert all(asdict(finding).values())

    @pytest.mark.parametrize(
        ("after", "counts"),
        [
            (Trial("layer", 5, 0.80, 50.0), True),  # a third less unexplained
            (Trial("layer", 5, 0.72, 50.0), False),  # within the margin
            (Trial("layer", 5, 0.80, 90.0), False),  # by more features
            (Trial("layer", 5, 0.90, 90.0), True),  # by far
            (Trial("scale", 1.2, 0.90, 50.0), False),  # near 1
            (Trial("scale", 0.7, 0.90, 50.0), True),
        ],
    )
    def test_what_counts_as_a_correction(self, after, counts):
        assert checks.improves(Trial("none", 1.0, 0.70, 50.0), after) == counts

    def test_a_correction_that_still_explains_nothing_is_no_cause(self):
        assert not checks.improves(Trial("none", 1.0, -9.0, 50.0), Trial("scale", 0.5, -4.0, 50.0))

    def test_no_variance_to_gain(self):
        assert not checks.improves(Trial("none", 1.0, 0.999, 50.0), Trial("scale", 0.5, 1.0, 50.0))

    def test_the_worst_level_decides(self):
        findings = {level: Finding(level, "a", "b", "c", "d") for level in ("note", "warning", "mismatch")}
        assert verdict_of([]) == verdict_of([findings["note"]]) == "fits"
        assert verdict_of([findings["note"], findings["warning"]]) == "fits with a warning"
        assert verdict_of(findings.values()) == "does not fit"


class TestDeclared:
    @pytest.mark.parametrize(
        ("said", "name", "what"),
        [
            ("gemma-2-2b", "google/gemma-2-2b", None),
            ("google/gemma-2-2b", "google/gemma-2-2b-it", "variant of the model"),
            ("Llama-3.1-8B-Base", "meta-llama/Llama-3.1-8B", None),
            ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "variant of the model"),
            ("gpt2-small", "openai-community/gpt2", None),
            ("pythia-70m-deduped", "openai-community/gpt2", "model"),
            (None, "openai-community/gpt2", None),
            ("gpt2-small", "", None),
        ],
    )
    def test_the_model_s_name(self, sae, said, name, what):
        model = make_model("gpt2")
        model.config._name_or_path = name
        finding = declared.model_name(replace(sae, metadata={"model_name": said}), model)
        assert (finding and finding.what) == what
        assert finding is None or finding.level == "warning"

    def test_a_local_folder_s_name_says_nothing(self, sae, tmp_path):
        model = make_model("gpt2")
        model.config._name_or_path = str(tmp_path)
        assert declared.model_name(replace(sae, metadata={"model_name": "gemma-2-2b"}), model) is None

    @pytest.mark.parametrize(("said", "warns"), [(True, False), (False, True), (None, False)])
    def test_bos(self, sae, tokenizer, said, warns):
        finding = declared.bos(replace(sae, metadata={"prepend_bos": said}), tokenizer)
        assert (finding is not None) == warns

    @pytest.mark.parametrize(("said", "noted"), [(128, True), (1024, False), (None, False)])
    def test_context(self, sae, said, noted):
        assert (declared.context(replace(sae, metadata={"context_size": said})) is not None) == noted

    @pytest.mark.parametrize(
        ("changes", "l0"),
        [
            ({"activation": TopK(9)}, 9.0),
            ({"metadata": {"k": 32}}, 32.0),
            ({"source": "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"}, 142.0),
            ({}, None),
        ],
    )
    def test_l0(self, sae, changes, l0):
        assert declared.declared_l0(replace(sae, **changes)) == l0


class TestFit:
    @pytest.fixture
    def run(self, llama, tokenizer, sae):
        def run(sae=sae, layer=LAYER, **changes):
            forget, retain = corpora()
            config = replace(SMALL, **{"force": False, "n": 3, **changes})
            return fit(llama, tokenizer, sae, layer=layer, forget=forget, retain=retain, config=config)

        return run

    def test_an_sae_that_fits_is_recorded(self, run):
        doctor = run().evidence["doctor"]
        assert (doctor["verdict"], doctor["forced"]) == ("fits", False)
        assert doctor["figures"]["whole"]["ordinary"] > 0.5

    @pytest.mark.parametrize(
        ("damage", "what"),
        [
            (unfolded(10.0), "scale of the SAE's input"),
            (input_bias(-1), "b_dec at the SAE's input"),
            (shuffled, "encoder and decoder"),
            (turned, ""),
        ],
    )
    def test_an_sae_that_does_not_fit_is_refused(self, run, sae, damage, what):
        with pytest.raises(errors.SAEMismatchError, match=f"{what}.*found.*expected.*--force"):
            run(damage(sae))

    def test_force_fits_and_records_it(self, run, sae, tmp_path):
        guardrail = run(shuffled(sae), force=True)
        guardrail.save_pretrained(tmp_path / "guard")
        doctor = type(guardrail).from_pretrained(tmp_path / "guard").evidence["doctor"]
        assert (doctor["verdict"], doctor["forced"]) == ("does not fit", True)
        assert doctor["findings"][0]["level"] == "mismatch"
        said = dict(facts(guardrail, guardrail.rule))["SAE fits?"]
        assert said.startswith("does not fit (forced): encoder and decoder")

    def test_force_cannot_run_an_sae_of_another_width(self, llama, tokenizer, texts):
        with pytest.raises(errors.SAEMismatchError, match="found 48, expected 32"):
            admit(Subject(llama, tokenizer, make_sae("relu", d_model=48), LAYER), texts, force=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory, llama, tokenizer, sae) -> list[str]:
    folder = tmp_path_factory.mktemp("doctor")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_saelens(replace(sae, metadata={"layer": LAYER}), folder / "sae", torch.float32)
    for name in WORDS:
        lines = [json.dumps({"text": text}) for text in passages(name, 80, words=30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    named = [f"{name}={folder / name}.jsonl" for name in WORDS]
    return ["doctor", "--model", str(folder / "model"), "--sae", str(folder / "sae"), "--dtype", "float32",
            "--device", "cpu", "--tokens", "2000", "--text", *named]  # fmt: skip


class TestCommand:
    def test_it_prints_the_verdict_first(self, words, capsys):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert said.split()[0] == "FITS"
        assert all(word in said for word in ("Explained variance", "kitchen", "layer", "Norms"))

    def test_it_prints_json(self, words, capsys):
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["layer"], found["verdict"]) == (LAYER, "fits")

    def test_what_does_not_fit_exits_1(self, words, capsys):
        assert main([*words, "--layer", str(LAYER - 1)]) == 1
        assert capsys.readouterr().out.split()[:3] == ["DOES", "NOT", "FIT"]

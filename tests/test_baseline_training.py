"""Training the weight-changing methods on tiny models: what they lower, what they change, and what goes wrong."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import SENTENCES, make_model, make_sae
from saeguard.baselines import memory
from saeguard.baselines import weight_settings as kinds
from saeguard.baselines.adapting import trainable
from saeguard.baselines.catalogue import BASELINES, Trial
from saeguard.baselines.grids import with_grid
from saeguard.baselines.memory import Needs
from saeguard.baselines.texts import Pairs, Texts
from saeguard.corpus import Corpus
from saeguard.errors import BaselineError, CorpusOverlapError, DoesNotFitError, NonFiniteLossError, UsageError
from saeguard.evaluation.comparison import drawn
from saeguard.evaluation.subject import checkpoint

# PEFT asks transformers 5 by an older name; transformers 4.57 wonders at checkpoints that follow each other so fast.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]
SHORT = {"steps": 6, "batch": 2, "max_tokens": 16, "check_every": 2, "learning_rate": 1e-3, "keep_utility": 0.0}
TRAINED = [name for name, one in BASELINES.items() if one.trains_weights and name != "ssd"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Forget text and two retain corpora."""
    folder = tmp_path_factory.mktemp("texts")

    def write(name, sentence):
        path = folder / f"{name}.txt"
        path.write_text("\n".join(f"{sentence} Number {i} of them." for i in range(20)), "utf-8")
        return str(path)

    return write("forget", SENTENCES[0]), {"bread": write("bread", SENTENCES[2]), "court": write("court", SENTENCES[3])}


@pytest.fixture
def trial_of(files, tokenizer, tmp_path):
    def make(name, family="llama", out="out", **changes):
        settings = BASELINES[name].settings
        chosen = settings(windows=8, max_tokens=16) if name == "ssd" else settings(**SHORT)
        return Trial(
            replace(chosen, **changes), lambda: (make_model(family), tokenizer), files[0], files[1],
            make_sae("jumprelu"), 2, tmp_path / out, tmp_path / "work",
        )  # fmt: skip

    return make


def fitted(name, trial):
    """Run it; the model that `eval` would judge."""
    BASELINES[name].run(trial)
    return checkpoint(str(trial.out), trial.load, device="cpu", dtype="float32").loaded[0]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(model, family="llama"):
    """Names of the weights that are not those of the model before."""
    before = weights(make_model(family))
    return {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}


def mean_nll(model, tokenizer, sentence):
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"][:, :16]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["grad-ascent", "grad-diff", "npo", "simnpo", "scrub", "task-vector", "dare"])
def test_forget_text_becomes_less_likely(name, trial_of, tokenizer, files):
    extra = {"task-vector": {"scale": 1.0}, "dare": {"rate": 0.2}, "scrub": {"forget_weight": 10.0}}
    model = fitted(name, trial_of(name, **extra.get(name, {})))
    before = make_model("llama")
    sentence = f"{SENTENCES[0]} Number 0 of them."
    assert mean_nll(model, tokenizer, sentence) > mean_nll(before, tokenizer, sentence) + 0.01
    assert changed(model) >= {f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)}


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_lowers_its_own_objective(name, trial_of, monkeypatch):
    from saeguard.baselines import training

    seen = []
    compute = training._Unlearning.compute_loss

    def watched(*args, **kwargs):
        seen.append(float((value := compute(*args, **kwargs)).detach()))
        return value

    monkeypatch.setattr(training._Unlearning, "compute_loss", watched)
    rate = 1e-2 if name in ("rmu", "crisp") else 1e-3
    BASELINES[name].run(trial_of(name, steps=16, check_every=16, learning_rate=rate))
    assert len(seen) == 16
    assert sum(seen[-4:]) < sum(seen[:4])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_rmu_changes_three_down_projections_alone(family, trial_of):
    model = fitted("rmu", trial_of("rmu", family))
    part = "transformer.h.{}.mlp.c_proj.weight" if family == "gpt2" else "model.layers.{}.mlp.down_proj.weight"
    assert changed(model, family) == {part.format(layer) for layer in range(3)}


@pytest.mark.parametrize("name", ["npo", "rmu", "scrub"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_leave_the_base_alone(name, family, trial_of, tokenizer):
    trial = trial_of(name, family, lora_rank=2)
    kept = []

    def load():
        kept.append(make_model(family))
        return kept[-1], tokenizer

    model = fitted(name, replace(trial, load=load))
    assert sorted(path.name for path in trial.out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "baseline.json",
    ]  # fmt: skip
    trained = dict(kept[0].named_parameters())
    for key, weight in weights(make_model(family)).items():
        prefix, _, leaf = key.rpartition(".")
        assert torch.equal(trained.get(key, trained.get(f"{prefix}.base_layer.{leaf}")), weight), key
    assert changed(model, family)


def test_crisp_changes_blocks_up_to_the_sae_alone(trial_of):
    model = fitted("crisp", trial_of("crisp", min_ratio=1.0))
    blocks = {name.split(".")[2] for name in changed(model)}
    assert blocks == {"0", "1", "2"}
    assert all("norm" not in name and "embed" not in name for name in changed(model))


def test_ssd_dampens_only_what_matters_more_to_forget_text(trial_of, files, tokenizer):
    from saeguard.baselines.ssd import importances
    from saeguard.baselines.texts import batches_of

    trial = trial_of("ssd", threshold=2.0, dampening=0.5)
    after = weights(fitted("ssd", trial))
    texts = Texts.read(tokenizer, *corpora(files), 16)
    found = {
        kind: importances(make_model("llama"), batches_of(rows, 1, 0, "cpu"))
        for kind, rows in (("forget", texts.forget[:8]), ("retain", texts.mixed(8)))
    }
    dampened = 0
    for name, weight in weights(make_model("llama")).items():
        forget, retain = found["forget"][name], found["retain"][name]
        chosen = forget > 2 * retain
        assert torch.equal(after[name][~chosen], weight[~chosen])
        factor = torch.minimum(0.5 * retain / forget, torch.ones(()))
        assert torch.allclose(after[name][chosen], (factor * weight)[chosen])
        dampened += int(chosen.sum())
    record = json.loads((trial.out / "baseline.json").read_text("utf-8"))
    assert record["dampened"] == dampened > 0


def test_ssds_importance_is_the_mean_squared_gradient_of_single_windows(tokenizer):
    from saeguard.baselines.likelihood import nll
    from saeguard.baselines.ssd import importances

    rows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :12] for text in SENTENCES[:3]]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    name = "model.layers.1.self_attn.q_proj.weight"
    model = make_model("llama")
    weight = model.get_parameter(name)
    squares = [torch.autograd.grad(nll(model, batch), weight)[0] ** 2 for batch in batches]
    assert torch.allclose(importances(make_model("llama"), batches)[name], sum(squares) / 3)


def test_dare_drops_its_share_and_keeps_the_mean():
    from saeguard.baselines.dare import combine, drop_and_rescale

    delta = torch.ones(200, 200)
    found = drop_and_rescale(delta, 0.75, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float((found == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    before, tuned = {"w": torch.zeros(200, 200)}, {"w": delta}
    settings = kinds.DARE(scale=0.5, rate=0.75)
    assert torch.equal(combine(settings, 0, before, tuned)["w"], -0.5 * found)
    assert torch.equal(combine(replace(settings, rate=0.0), 0, before, tuned)["w"], -0.5 * delta)


def test_negation_takes_the_tuned_weights_the_other_way(trial_of):
    half, whole = (weights(fitted("task-vector", trial_of("task-vector", out=str(s), scale=s))) for s in (0.5, 1.0))
    none = weights(fitted("dare", trial_of("dare", out="dare", scale=1.0, rate=0.0)))
    for name, before in weights(make_model("llama")).items():
        assert torch.allclose(before - half[name], 0.5 * (before - whole[name]), atol=1e-7)
        assert torch.allclose(none[name], whole[name], atol=1e-7)


def test_a_task_vector_is_trained_once_for_all_its_scales(trial_of):
    fitted("task-vector", trial_of("task-vector", out="a", scale=0.5))
    fitted("dare", trial_of("dare", out="b", scale=2.0))
    assert len(list(trial_of("dare").work.iterdir())) == 1


@pytest.mark.parametrize(("name", "changes"), [("npo", {}), ("crisp", {"min_ratio": 1.0}), ("rmu", {"lora_rank": 2})])
def test_the_same_seed_gives_the_same_digits_and_another_does_not(name, changes, trial_of):
    runs = [trial_of(name, out=out, **changes) for out in ("a", "b", "c")]
    one, same, other = (
        weights(fitted(name, replace(run, seed=seed))) for run, seed in zip(runs, (1, 1, 2), strict=True)
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "changes"), [("grad-diff", {}), ("npo", {"lora_rank": 2}), ("scrub", {"accumulate": 2})]
)
def test_a_killed_run_goes_on_to_the_same_end(name, changes, trial_of, monkeypatch):
    from saeguard.baselines import training

    whole = weights(fitted(name, trial_of(name, out="whole", **changes)))
    looked = training._Looks.on_step_end

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed
        return looked(self, args, state, control, **kwargs)

    trial = trial_of(name, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(training._Looks, "on_step_end", killed)
        with pytest.raises(Killed):
            BASELINES[name].run(trial)
    assert not trial.out.exists()
    steps = []
    monkeypatch.setattr(
        training._Looks,
        "on_step_end",
        lambda self, args, state, control, **kwargs: (
            steps.append(state.global_step),
            looked(self, args, state, control, **kwargs),
        )[1],
    )
    resumed = weights(fitted(name, trial))
    assert steps == [5, 6]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not list(trial.work.iterdir())


def test_a_checkpoint_that_was_cut_off_is_not_taken(trial_of, tmp_path):
    from saeguard.baselines.training import last_checkpoint

    for step, text in ((2, '{"log_history": []}'), (4, '{"log_his')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text, "utf-8")
    (tmp_path / "checkpoint-6").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(trial_of, monkeypatch):
    from saeguard.baselines import gradient_difference

    loss, calls = gradient_difference.loss, []

    def breaks(settings, model, reference, pair):
        calls.append(0)
        value = loss(settings, model, reference, pair)
        return value * float("nan") if len(calls) == 4 else value

    monkeypatch.setattr(gradient_difference, "loss", breaks)
    trial = trial_of("grad-diff")
    with pytest.raises(
        NonFiniteLossError, match="loss is nan at step 4 of 6; the state after step 2 is kept in"
    ) as info:
        BASELINES["grad-diff"].run(trial)
    assert info.value.step == 4
    assert not trial.out.exists()
    kept = AutoModelForCausalLM.from_pretrained(info.value.checkpoint)
    assert all(torch.isfinite(weight).all() for weight in kept.parameters())


def test_weights_that_are_infinite_are_not_kept(trial_of):
    with pytest.raises(NonFiniteLossError, match="no earlier state was kept"):
        BASELINES["grad-diff"].run(trial_of("grad-diff", learning_rate=1e38, check_every=1))


def test_training_stops_where_utility_falls_and_keeps_what_was_good(trial_of):
    trial = trial_of("grad-ascent", steps=40, check_every=1, keep_utility=0.5, learning_rate=2e-3)
    fitted("grad-ascent", trial)
    record = json.loads((trial.out / "baseline.json").read_text("utf-8"))
    assert 0 < record["steps"] < 40
    assert record["utility_after"] >= 0.5 * record["utility_before"]
    assert record["ended"].startswith("utility fell from")


def test_a_method_that_ruins_the_model_before_the_first_look_says_so(trial_of):
    with pytest.raises(BaselineError, match="by step 6, the first look: nothing good was left"):
        BASELINES["grad-ascent"].run(trial_of("grad-ascent", check_every=6, keep_utility=0.99, learning_rate=1e-2))


def test_the_record_says_what_was_done(trial_of, capsys):
    trial = trial_of("npo", beta=0.2)
    fitted("npo", trial)
    assert not capsys.readouterr().out
    record = json.loads((trial.out / "baseline.json").read_text("utf-8"))
    assert record["method"] == "NPO"
    assert record["settings"]["beta"] == 0.2
    assert record["steps"] == 6
    assert set(record["texts"]) == {"forget", "retain.bread", "retain.court"}
    assert record["seconds"] > 0
    assert record["peak_bytes"] > 0 < record["estimated_bytes"]


@pytest.mark.parametrize("name", ["grad-diff", "npo", "simnpo", "rmu", "scrub", "ssd", "crisp"])
def test_without_retain_text_it_does_not_start(name, trial_of):
    with pytest.raises(UsageError, match="--retain"):
        BASELINES[name].run(replace(trial_of(name), retain={}))


@pytest.mark.parametrize("name", ["grad-ascent", "task-vector", "dare"])
def test_some_need_no_retain_text(name, trial_of):
    assert changed(fitted(name, replace(trial_of(name, keep_utility=0.9), retain={})))


def test_texts_are_checked(trial_of, files):
    with pytest.raises(CorpusOverlapError):
        BASELINES["npo"].run(replace(trial_of("npo"), retain={"same": files[0]}))


def test_what_does_not_fit_is_said_before_anything_is_loaded(trial_of, monkeypatch, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(memory, "available", lambda device: 1000)

    def load():
        raise AssertionError("loaded")

    trial = replace(trial_of("npo"), load=load, source=str(tmp_path / "model"))
    with pytest.raises(DoesNotFitError, match=r"estimated at .* GB.*--lora-rank"):
        BASELINES["npo"].run(trial)
    with pytest.raises(DoesNotFitError):
        BASELINES["npo"].run(trial_of("npo"))


def test_the_estimate_counts_weights_copies_and_training():
    needs = Needs(weights=10, trained=4, copies=2, tokens=5, blocks=3, d_model=2, d_ff=7, vocabulary=11)
    assert needs.bytes == 4 * 10 * 2 + 12 * 4 + 4 * 5 * (3 * (16 * 2 + 3 * 7) + 4 * 11)


@pytest.mark.parametrize("name", [name for name, one in BASELINES.items() if one.trains_weights])
def test_the_grids_are_of_settings_that_there_are_and_have_eight_configurations(name):
    for preset in ("small", "paper"):
        baseline = with_grid(BASELINES[name], preset)
        settings = drawn(baseline, 1000)
        assert len(settings) == prod(len(values) for values in baseline.grid.values()) >= 8
        assert all(replace(baseline.settings(), **setting) for setting in settings)


def test_other_folders_are_not_written_over(trial_of):
    trial = trial_of("grad-diff")
    trial.out.mkdir()
    (trial.out / "mine.txt").write_text("mine", "utf-8")
    with pytest.raises(BaselineError, match="was not written by a baseline"):
        BASELINES["grad-diff"].run(trial)
    assert (trial.out / "mine.txt").read_text("utf-8") == "mine"


def test_a_folder_of_a_baseline_is_replaced(trial_of):
    fitted("grad-diff", trial_of("grad-diff"))
    fitted("npo", trial_of("npo"))
    assert json.loads((trial_of("npo").out / "baseline.json").read_text("utf-8"))["method"] == "NPO"


def test_float16_is_refused(trial_of, tokenizer):
    trial = replace(trial_of("npo"), load=lambda: (make_model("llama").half(), tokenizer))
    with pytest.raises(BaselineError, match="float16"):
        BASELINES["npo"].run(trial)


def test_a_bfloat16_model_trains_in_float32_and_is_saved_as_it_was(trial_of, tokenizer):
    trial = replace(trial_of("npo"), load=lambda: (make_model("llama").bfloat16(), tokenizer))
    BASELINES["npo"].run(trial)
    assert AutoModelForCausalLM.from_pretrained(trial.out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"batch": 3, "accumulate": 2}, {"steps": 0}])
def test_settings_that_cannot_be_are_refused(changes, trial_of):
    with pytest.raises(BaselineError, match="multiple of accumulate"):
        BASELINES["npo"].run(trial_of("npo", **changes))


def test_crisp_reads_saes_of_more_layers(trial_of):
    with pytest.raises(UsageError, match="LAYER=SAE"):
        BASELINES["crisp"].run(trial_of("crisp", more_saes=("my-sae",)))


def corpora(files):
    retain = {name: Corpus.of(name, "retain", file) for name, file in files[1].items()}
    return Corpus.of("forget", "forget", files[0]), retain


def test_pairs_use_every_window_alike_and_leave_the_test_split_alone(files, tokenizer):
    texts = Texts.read(tokenizer, *corpora(files), 16)
    pairs = Pairs(texts, 2 * len(texts.forget), seed=0)
    assert sorted(w.ids for w, _ in pairs) == sorted(w.ids for w in texts.forget for _ in range(2))
    kept = [retain for _, retain in pairs]
    by_corpus = [sum(one in rows for one in kept) for rows in texts.retain.values()]
    assert by_corpus == [len(texts.forget)] * 2
    assert {w.split for w in texts.forget} == {"fit"}
    assert {w.split for w in texts.held_out} == {"calibration"}


def test_dropout_is_off():
    model = trainable(make_model("gpt2"), None, 0)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))

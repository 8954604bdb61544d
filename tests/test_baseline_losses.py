"""The loss of each weight-changing method is that of its paper, computed slowly."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

import reference_losses as slow
from conftest import SENTENCES, make_model, make_sae
from saeguard.baselines import crisp, gradient_ascent, gradient_difference, npo, rmu, scrub, simnpo, task_vector
from saeguard.baselines.weight_settings import CRISP, NPO, RMU, SCRUB, GradientDifference, SimNPO
from saeguard.model import residual_stream
from saeguard.windows import Window, pad


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Forget and retain rows of different lengths, with padding."""

    def batch(texts):
        rows = [tuple(tokenizer(text)["input_ids"][:length]) for text, length in zip(texts, (9, 5), strict=True)]
        ids, mask = pad([Window(0, "fit", 16, row, "") for row in rows], pad_id=0)
        return {"input_ids": ids, "attention_mask": mask}

    return {"forget": batch(SENTENCES[:2]), "retain": batch(SENTENCES[2:4])}


@pytest.fixture(scope="module")
def models():
    """The model before and the model now."""
    return make_model("llama", seed=0).requires_grad_(False), make_model("llama", seed=1)


@pytest.fixture
def reference(models):
    @contextmanager
    def before():
        with torch.no_grad():
            yield models[0]

    return before


def value(loss):
    return float(loss.detach())


def lengths(batch):
    return batch["attention_mask"].sum(dim=1).tolist()


def rows(model, batch):
    """Logits and ids of each row by itself, so that padding cannot matter."""
    found = []
    for ids, length in zip(batch["input_ids"], lengths(batch), strict=True):
        with torch.no_grad():
            found.append((model(input_ids=ids[None, :length]).logits[0].double(), ids[:length].tolist()))
    return found


def streams(model, batch, layer):
    ids = [ids[None, :length] for ids, length in zip(batch["input_ids"], lengths(batch), strict=True)]
    return [residual_stream(model, layer, row, torch.ones_like(row))[0].double() for row in ids]


def test_likelihood_methods(models, reference, pair):
    now = models[1]
    forget, retain = slow.nll(rows(now, pair["forget"])), slow.nll(rows(now, pair["retain"]))
    near = partial(pytest.approx, rel=1e-5)
    assert value(gradient_ascent.loss(now, reference, pair)) == near(-forget)
    assert value(task_vector.loss(now, reference, pair)) == near(forget)
    difference = GradientDifference(forget_weight=0.5, retain_weight=3.0)
    assert value(gradient_difference.loss(difference, now, reference, pair)) == near(3 * retain - 0.5 * forget)
    settings = SimNPO(beta=2.0, margin=0.3, forget_weight=0.7, retain_weight=1.5)
    expected = 0.7 * slow.simnpo(rows(now, pair["forget"]), 2.0, 0.3) + 1.5 * retain
    assert value(simnpo.loss(settings, now, reference, pair)) == near(expected)


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_npo(models, reference, pair, retain_loss):
    before, now = models
    kept = (
        slow.nll(rows(now, pair["retain"])) if retain_loss == "nll"
        else slow.kl(rows(before, pair["retain"]), rows(now, pair["retain"]))
    )  # fmt: skip
    expected = 0.5 * slow.npo(rows(before, pair["forget"]), rows(now, pair["forget"]), 0.2) + 2 * kept
    settings = NPO(beta=0.2, forget_weight=0.5, retain_weight=2.0, retain_loss=retain_loss)
    assert value(npo.loss(settings, now, reference, pair)) == pytest.approx(expected, rel=1e-5)


def test_npo_with_a_small_beta_has_the_gradient_of_gradient_ascent(models, reference, pair):
    one = {"forget": {name: rows[:1] for name, rows in pair["forget"].items()}, "retain": pair["retain"]}
    now = models[1]
    weight = now.get_parameter("model.layers.1.mlp.up_proj.weight")
    tokens = lengths(one["forget"])[0] - 1
    ascent = torch.autograd.grad(tokens * gradient_ascent.loss(now, reference, one), weight)[0]
    small = torch.autograd.grad(npo.loss(NPO(beta=1e-6, retain_weight=0.0), now, reference, one), weight)[0]
    assert torch.allclose(small, ascent, rtol=1e-2, atol=1e-3 * float(ascent.abs().max()))


def test_scrub(models, reference, pair):
    now = models[1]
    old, new = ({kind: rows(model, pair[kind]) for kind in pair} for model in models)
    expected = (
        0.3 * slow.kl(old["retain"], new["retain"], 2.0) + 0.8 * slow.nll(new["retain"])
        - 0.1 * slow.kl(old["forget"], new["forget"], 2.0)
    )  # fmt: skip
    settings = SCRUB(distil_weight=0.3, retain_weight=0.8, forget_weight=0.1, temperature=2.0)
    assert value(scrub.loss(settings, now, reference, pair)) == pytest.approx(expected, rel=1e-5)


def test_rmu(models, reference, pair):
    before, now = models
    settings = RMU(coeff=6.5, retain_weight=0.4)
    control = rmu.control_vector(settings, 2, 0, now, pair["forget"])
    forget, retain = (streams(now, pair[kind], 2) for kind in ("forget", "retain"))
    wanted = [control.double().expand_as(one) for one in forget]
    kept = slow.squared_distance(retain, streams(before, pair["retain"], 2))
    expected = slow.squared_distance(forget, wanted) + 0.4 * kept
    assert value(rmu.loss(settings, 2, control, now, reference, pair)) == pytest.approx(expected, rel=1e-5)


def test_rmus_random_vector_has_the_length_asked_for(models, pair):
    model = models[0]
    absolute = rmu.control_vector(RMU(coeff=6.5), 2, 0, model, pair["forget"])
    assert float(absolute.norm()) == pytest.approx(6.5)
    norms = torch.cat([one[1:].norm(dim=1) for one in streams(model, pair["forget"], 2)])
    relative = rmu.control_vector(RMU(strength=3.0), 2, 0, model, pair["forget"])
    assert float(relative.norm()) == pytest.approx(3 * float(norms.median()), rel=1e-5)
    assert torch.equal(rmu.control_vector(RMU(coeff=6.5), 2, 0, model, pair["retain"]), absolute)
    assert not torch.equal(rmu.control_vector(RMU(coeff=6.5), 2, 1, model, pair["forget"]), absolute)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_crisp(models, reference, pair, activation):
    before, now = models
    saes = {1: make_sae(activation, seed=1), 2: make_sae(activation, seed=2)}
    features = {layer: _active(sae, before, pair["forget"], layer)[:5] for layer, sae in saes.items()}
    suppress, kept = 0.0, 0.0
    for layer, sae in saes.items():
        old, new = ([sae.encode(one) for one in streams(model, pair["forget"], layer)] for model in models)
        suppress += slow.suppressed(new, old, features[layer]) / 2
        kept += slow.squared_distance(*(streams(model, pair["retain"], layer) for model in models)) / 2
    last = slow.squared_distance(*(streams(model, pair["retain"], 3) for model in models))
    expected = 0.2 * suppress + 0.8 * (kept + 0.05 * last)
    settings = CRISP(beta=0.8, gamma=0.05)
    found = crisp.loss(settings, saes, features, now, reference, pair)
    assert value(found) == pytest.approx(expected, rel=1e-4)


def _active(sae, model, batch, layer):
    fired = torch.cat([sae.encode(one[1:]) for one in streams(model, batch, layer)]).count_nonzero(dim=0)
    return fired.argsort(descending=True).tolist()


def test_crisp_takes_the_features_that_fire_more_on_forget_text(models, pair):
    sae = make_sae("jumprelu")
    forget, retain = [pair["forget"]], [pair["retain"]]
    settings = CRISP(features=4, min_ratio=2.0)
    found = crisp.select(settings, models[0], {2: sae}, forget, retain)[2]
    rates, means = [], []
    for batch in (pair["forget"], pair["retain"]):
        a = torch.cat([sae.encode(one[1:]) for one in streams(models[0], batch, 2)])
        rates.append((a > 0).double().mean(dim=0))
        means.append(a.double().mean(dim=0))
    difference = rates[0] - rates[1]
    allowed = [j for j in range(sae.d_sae) if difference[j] > 0 and means[0][j] >= 2 * means[1][j]]
    assert found == sorted(allowed, key=lambda j: -float(difference[j]))[:4]
    assert found

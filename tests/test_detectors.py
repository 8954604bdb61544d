"""Learned gates: the loss is the one that is written down, and what is learned is which tokens speak for a topic."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from saeguard.detectors import (
    PENALTY,
    LabelledTokens,
    _of_means,
    _of_tokens,
    _PeakLoss,
    _Windows,
    balanced,
    fit_evidence,
    fit_probe,
)
from saeguard.gate import Evidence, Probe

COLUMNS = 6
TOPIC, CONTEXT = 0, 1


def windows(*, count: int = 60, seed: int = 0) -> tuple[list[Tensor], list[bool]]:
    """Every other window is forget text: one of its tokens is of the topic (column 0), and half of all its tokens, as
    of a fifth of the retain windows, are of a context (column 1) that the topic is often found in."""
    generator = torch.Generator().manual_seed(seed)
    texts, forget = [], []
    for place in range(count):
        x = torch.randn(int(torch.randint(5, 30, (1,), generator=generator)), COLUMNS, generator=generator) * 0.1
        about = place % 2 == 0
        x[: len(x) // 2, CONTEXT] += float(about or place % 10 == 1)
        x[-1, TOPIC] += 2.0 * about
        texts.append(x)
        forget.append(about)
    return texts, forget


def labelled(texts: list[Tensor], forget: list[bool]) -> LabelledTokens:
    return LabelledTokens(torch.cat(texts), torch.tensor([len(x) for x in texts]), torch.tensor(forget))


def slow_loss(weights: Tensor, constant: float, texts: list[Tensor], forget: list[bool], penalty: float) -> float:
    """The loss of weights in the units of `x`, window by window."""
    spread = torch.cat(texts).double().std(dim=0, correction=0)
    shares = balanced(np.array(forget))
    losses = []
    for x, about, share in zip(texts, forget, shares, strict=True):
        odds = math.log(sum(math.exp(float(token.double() @ weights)) for token in x)) + constant
        losses.append(share * math.log1p(math.exp(-odds if about else odds)))
    return sum(losses) / len(losses) + penalty * float((weights * spread).square().sum())


def test_the_weights_of_tokens_are_those_of_least_loss():
    texts, forget = windows(count=24)
    weights = _of_tokens(_PeakLoss(_Windows.of(labelled(texts, forget)), 0.02))
    constants = np.linspace(-8, 2, 201)
    best = min(constants, key=lambda constant: slow_loss(weights, constant, texts, forget, 0.02))
    least = slow_loss(weights, best, texts, forget, 0.02)
    for column in range(COLUMNS):
        for step in (-0.1, 0.1):
            moved = weights.clone()
            moved[column] += step
            around = (slow_loss(moved, best + shift, texts, forget, 0.02) for shift in (-0.1, 0.0, 0.1))
            assert min(around) > least - 1e-6


def test_the_gradient_is_that_of_the_loss():
    loss = _PeakLoss(_Windows.of(labelled(*windows(count=12))), 0.02)
    at = np.linspace(-1, 1, COLUMNS + 1)
    _, gradient = loss(at)
    for place, step in enumerate(np.eye(COLUMNS + 1) * 1e-2):
        assert (loss(at + step)[0] - loss(at - step)[0]) / 2e-2 == pytest.approx(gradient[place], abs=1e-3)


def test_the_score_is_the_sum_of_both_in_units_of_their_spread():
    data = labelled(*windows())
    every = _Windows.of(data)
    parts = [_of_means(every, 0.01), _of_tokens(_PeakLoss(every, PENALTY))]
    scores = [data.x.double() @ part for part in parts]
    expected = sum(part / score.std() for part, score in zip(parts, scores, strict=True))
    torch.testing.assert_close(fit_probe(data).weights.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_means_are_regressed_as_by_hand():
    texts, forget = windows()
    x = StandardScaler().fit_transform([value.mean(dim=0).numpy() for value in texts])
    expected = LogisticRegression(C=0.3).fit(x, forget).coef_[0] / np.std(
        [value.mean(dim=0).numpy() for value in texts], axis=0
    )
    found = _of_means(_Windows.of(labelled(texts, forget)), 0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_one_token_of_the_topic_makes_the_window_and_its_context_does_not():
    texts, forget = windows()
    probe = fit_probe(labelled(texts, forget))
    scale = probe.weights / probe.weights.abs().max()
    assert scale[TOPIC] == 1
    others, about = windows(seed=1)
    peaks = [float((x @ probe.weights).max()) for x in others]
    assert min(p for p, is_ in zip(peaks, about, strict=True) if is_) > max(
        p for p, is_ in zip(peaks, about, strict=True) if not is_
    )


def test_the_mean_score_of_retain_windows_is_zero():
    texts, forget = windows()
    probe = fit_probe(labelled(texts, forget))
    means = [
        float((x @ probe.weights).mean()) + probe.bias for x, about in zip(texts, forget, strict=True) if not about
    ]
    assert np.mean(means) == pytest.approx(0, abs=1e-5)


def test_a_column_that_never_varies_gets_no_weight():
    texts, forget = windows()
    for x in texts:
        x[:, 3] = 7.0
    assert fit_probe(labelled(texts, forget)).weights[3] == pytest.approx(0, abs=1e-3)


def test_activity_and_half_precision_are_read_as_they_are():
    texts, forget = windows()
    active = [x > 0.5 for x in texts]
    evidence = fit_evidence(labelled(active, forget))
    assert isinstance(evidence, Evidence)
    assert evidence.weights[TOPIC] == evidence.weights.max() > 0
    half = [x.to(torch.bfloat16) for x in texts]
    probe, same = fit_probe(labelled(half, forget)), fit_probe(labelled([x.float() for x in half], forget))
    assert isinstance(probe, Probe)
    assert torch.equal(probe.weights, same.weights)


def test_windows_larger_than_a_block_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    data = labelled(*windows(count=20))
    whole = fit_probe(data)
    monkeypatch.setattr("saeguard.detectors.BLOCK", 7)
    torch.testing.assert_close(fit_probe(data).weights, whole.weights, rtol=1e-2, atol=1e-3)


def test_both_sides_weigh_the_same():
    weights = balanced(np.array([True, False, False, False]))
    assert weights.tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])


def test_rows_weigh_as_told_beside_others_of_their_side():
    weights = balanced(np.array([True, False, False, True]), np.array([1.0, 3.0, 1.0, 1.0]))
    assert weights.tolist() == pytest.approx([1, 1.5, 0.5, 1])


def test_retain_windows_that_weigh_more_score_lower():
    texts, forget = windows(count=40)
    data = labelled(texts, forget)
    some = [place for place, about in enumerate(forget) if not about][:5]
    told = replace(data, weights=np.array([20.0 if place in some else 1.0 for place in range(40)]))

    def gap(probe: Probe) -> float:
        scores = [float(probe.scores(x, x).mean()) for x in texts]
        others = [score for place, score in enumerate(scores) if place not in some and not forget[place]]
        return sum(others) / len(others) - sum(scores[place] for place in some) / len(some)

    assert gap(fit_probe(told)) > gap(fit_probe(data))

"""`conditional-refuse`: against the full SAE token by token, and how the refusal feature is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import D_SAE, make_guardrail, make_sae
from saeguard import Guardrail
from saeguard.baselines import settings
from saeguard.baselines.catalogue import BASELINES
from saeguard.baselines.guarded import ALWAYS
from saeguard.baselines.refusal_clamp import REFUSALS, raising, refusal_feature, statistics_of
from saeguard.clamp import Clamp
from saeguard.doctor.reading import Subject
from saeguard.errors import SelectionError
from saeguard.gate import Density, Gate
from saeguard.hookpoints import HookPoint
from saeguard.model import capture, residual_stream
from saeguard.selection import SelectionRule
from saeguard.statistics import FeatureStatistics
from saeguard.tokens import special_token_ids
from test_baselines import FEATURES, trial
from test_baselines import files as files
from tiny import prompts
from topics import LAYER

C, BOOST = 20.0, 0.5
RAISED = next(j for j in range(D_SAE) if j not in FEATURES)


def conditional(model, tokenizer) -> Guardrail:
    return make_guardrail(
        model, tokenizer, make_sae("jumprelu"), LAYER, gate=Gate(Density()), threshold=ALWAYS,
        clamp=Clamp("active", c=C, strength=1.0),
    )  # fmt: skip


def test_each_active_feature_is_clamped_and_gives_its_share_to_the_refusal_feature(llama, tokenizer):
    sae, row = make_sae("jumprelu"), prompts(40, seed=1)[0]
    hidden = residual_stream(llama, LAYER, row, torch.ones_like(row))[0]
    expected, raised = hidden.clone(), 0
    for t, token in enumerate(row[0].tolist()):
        if t == 0 or token in special_token_ids(tokenizer):
            continue
        a = sae.encode(hidden[t][None])[0]
        wanted = a.clone()
        for j in FEATURES:
            if a[j] > 0:
                wanted[j] = -C
                wanted[RAISED] += BOOST * (C + a[j])
                raised += 1
        expected[t] = sae.decode(wanted) + (hidden[t] - sae.decode(a))
    assert raised
    guardrail = raising(conditional(llama, tokenizer), sae, RAISED, BOOST)
    with guardrail.attach(llama, tokenizer):
        point = HookPoint(LAYER)
        found = capture(llama, [point], row, torch.ones_like(row))[point][0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_refusal_feature_is_the_loudest_of_those_that_are_refusals_own():
    refusals, *others = (FeatureStatistics.of(torch.rand(50, D_SAE)) for _ in range(3))
    clamped = (3, 7)
    squares = [part.squares / part.count for part in (refusals, *others)]
    ratio = [float(squares[0][j] / max(its[j] for its in squares[1:])) for j in range(D_SAE)]
    among = sorted((j for j in range(D_SAE)), key=lambda j: -ratio[j])[: D_SAE // 4]
    expected = max((j for j in among if j not in clamped), key=lambda j: float(squares[0][j]))
    rule = SelectionRule(p_ratio=75.0)
    assert refusal_feature(refusals, {"a": others[0], "b": others[1]}, clamped, rule) == expected


def test_it_is_found_on_refusals_and_written_down(files, llama, tokenizer, tmp_path):
    chosen = settings.ConditionalRefuse(n=4, boost=0.25)
    BASELINES["conditional-refuse"].run(trial(files, llama, tokenizer, tmp_path / "a", chosen))
    BASELINES["conditional"].run(trial(files, llama, tokenizer, tmp_path / "b", settings.Conditional(n=4)))
    rule, plain = (Guardrail.from_pretrained(tmp_path / name).rule for name in "ab")
    found = rule.evidence["refusal"]
    sae = make_sae("jumprelu")
    assert found["feature"] not in rule.features
    assert statistics_of(Subject(llama, tokenizer, sae, LAYER), REFUSALS).fired[found["feature"]] > 0
    assert (rule.features, rule.clamp, rule.threshold) == (plain.features, plain.clamp, plain.threshold)
    torch.testing.assert_close(plain.decoder - rule.decoder, (0.25 * sae.W_dec[found["feature"]]).expand(4, -1))
    given = replace(chosen, refusal_feature=found["feature"])
    BASELINES["conditional-refuse"].run(trial(files, llama, tokenizer, tmp_path / "c", given))
    assert torch.equal(Guardrail.from_pretrained(tmp_path / "c").rule.decoder, rule.decoder)


@pytest.mark.parametrize("feature", [-1, D_SAE, FEATURES[0]])
def test_a_feature_that_cannot_be_raised_is_refused(llama, tokenizer, feature):
    with pytest.raises(SelectionError, match="--refusal-feature"):
        raising(conditional(llama, tokenizer), make_sae("jumprelu"), feature, BOOST)

"""The residual stream changed around the guard: what that undoes, and that the guard does not see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import D_MODEL, make_guardrail, make_sae
from saeguard.attacks import steering, steering_each
from saeguard.attacks.attack import CLEAN
from saeguard.attacks.task import Attacked, attacked
from saeguard.clamp import Clamp
from saeguard.evaluation.mcq import Question
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.tasks.multiple_choice import QuestionItem
from saeguard.gate import Gate, Probe
from saeguard.guardrail import Guardrail
from saeguard.model import capture
from saeguard.online.intervention import Guard
from saeguard.online.passes import only_the_last
from tiny import prompts
from topics import passages

LAYER = 1
ITEMS = [
    QuestionItem(str(i), "topic", "topic", Question(f"{text}?", tuple(text.split()[:4]), i % 4))
    for i, text in enumerate(passages("forget", 10, words=8))
]
ROWS = prompts(9, 14, 20, seed=5)


@pytest.fixture(scope="module", params=["density", "probe"])
def guardrail(request: pytest.FixtureRequest, llama: Any, tokenizer: Any) -> Guardrail:
    """Triggers on everything."""
    gate = Gate(Probe(torch.linspace(-1, 1, D_MODEL), 0.1)) if request.param == "probe" else None
    options = {} if gate is None else {"gate": gate}
    clamp = Clamp("dense", c=40.0, strength=8.0)
    return make_guardrail(llama, tokenizer, make_sae("jumprelu"), LAYER, threshold=-1e9, clamp=clamp, **options)


@pytest.fixture(scope="module")
def subject(llama: Any, tokenizer: Any, guardrail: Guardrail) -> Subject:
    return Subject.guarded("guarded", Loader(lambda: (llama, tokenizer)), guardrail)


def stream(model: Any, guardrail: Guardrail, row: Tensor) -> Tensor:
    return capture(model, [guardrail.point], row, torch.ones_like(row))[guardrail.point]


def test_what_the_clamp_adds_is_gone_and_nothing_else(llama, tokenizer, guardrail, subject, tmp_path):
    attack = steering.steered("direction-removed", subject, guardrail, ITEMS, 1, tmp_path)
    for row in ROWS:
        plain = stream(llama, guardrail, row)
        with guardrail.attach(llama, tokenizer), only_the_last():
            guarded = stream(llama, guardrail, row)
        with attack.open() as opened, only_the_last():
            attacked = stream(opened.model, guardrail, row)
            assert opened.guard.verdicts[0].triggered
        hot = (guarded != plain).any(dim=-1)
        left, clamped = ((values - plain)[hot].norm(dim=-1) for values in (attacked, guarded))
        assert left.mean() < 0.5 * clamped.mean()
        assert torch.equal(attacked[~hot], plain[~hot]), "what was not clamped is left alone"
    assert attack.fingerprint != subject.fingerprint


def test_a_guard_behind_the_attacked_one_stays_on(llama, tokenizer, guardrail, subject, tmp_path):
    behind = make_guardrail(llama, tokenizer, make_sae("jumprelu"), LAYER + 1, features=range(40), threshold=-1e9)

    @contextmanager
    def both(model: Any, words: Any) -> Iterator[Guard]:
        with guardrail.attach(model, words), behind.attach(model, words) as guard:
            yield guard

    attack = steering.steered("direction-removed", replace(subject, attach=both), guardrail, ITEMS, 1, tmp_path)
    alone = steering.steered("direction-removed", subject, guardrail, ITEMS, 1, tmp_path)
    for row in ROWS:
        with attack.open() as opened, only_the_last():
            attacked = stream(opened.model, behind, row)
            assert opened.guard.guardrail is behind
            assert opened.guard.verdicts[0].triggered
        with alone.open() as opened, only_the_last():
            assert not torch.equal(stream(opened.model, behind, row), attacked)


def test_what_is_added_in_front_is_not_seen_by_the_guard_and_brings_answers_nearer(
    llama, tokenizer, guardrail, subject, tmp_path
):
    search = {steps: steering.steered("error-steered", subject, guardrail, ITEMS, steps, tmp_path) for steps in (0, 25)}
    rows = steering.Rows.of(tokenizer, ITEMS[:4], torch.device("cpu"))
    losses, verdicts = {}, {}
    for steps, attack in search.items():
        with attack.open() as opened, only_the_last(), torch.no_grad():
            losses[steps] = float(steering._loss(opened.model, rows))
            verdicts[steps] = opened.guard.verdicts
    assert losses[25] < losses[0]
    for one, other in zip(verdicts[0], verdicts[25], strict=True):
        assert one.statistic == pytest.approx(other.statistic, abs=1e-3)
        assert one.features == other.features


def test_a_vector_that_was_found_is_not_searched_for_again(subject, guardrail, tmp_path, monkeypatch):
    first = steering.steered("error-steered", subject, guardrail, ITEMS, 2, tmp_path)
    monkeypatch.setattr(steering, "search", lambda *_, **__: pytest.fail("searched again"))
    again = steering.steered("error-steered", subject, guardrail, ITEMS, 2, tmp_path)
    assert first.fingerprint == again.fingerprint
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        steering.steered("error-steered", subject, replace(guardrail, rules=guardrail.rules), ITEMS[1:], 2, tmp_path)


def test_the_model_is_left_as_it_was(llama, subject, guardrail, tmp_path):
    row = ROWS[0]
    plain = stream(llama, guardrail, row)
    for name in steering.SAYS:
        with steering.steered(name, subject, guardrail, ITEMS, 1, tmp_path).open():
            pass
        assert torch.equal(stream(llama, guardrail, row), plain)
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("name", steering_each.SAYS)
def test_a_vector_for_each_question_makes_one_option_win(subject, guardrail, name):
    items = tuple(attacked(CLEAN, ITEMS, 0))
    given = {item.id: item.question.answer for item in items}
    found = {}
    for steps in (0, 25):
        task = steering_each.SteeredEach(name, items, subject, guardrail, steps, 60.0)
        with subject.open() as opened:
            records = [
                record for batch in task.batches(opened.tokenizer, items) for record in task.run(opened, batch, 0)
            ]
            assert opened.guard is not None, "the guard is back"
        found[steps] = sum(record.scores["accuracy"] for record in records)
        hits = [record for record in records if record.scores["accuracy"]]
        assert all((record.scores["chosen"] == given[record.item]) == (name == "error-found") for record in hits)
        assert all(record.scores["calls"] == steps and record.triggered for record in records)
    assert found[25] > found[0]


def test_a_search_for_each_question_leaves_the_unguarded_model_as_it_is(subject, guardrail):
    items = tuple(attacked(CLEAN, ITEMS[:4], 0))
    unguarded = Subject("unguarded", subject.loader)
    task = steering_each.SteeredEach("error-forced", items, subject, guardrail, 5, 60.0)
    with unguarded.open() as opened:
        searched, plain = (
            [(r.item, r.scores["chosen"], r.scores["accuracy"]) for r in kind.run(opened, items, 0)]
            for kind in (task, Attacked("clean", items))
        )
    assert searched == plain

"""Attacks by whoever has the weights, relearning apart, as jobs of a campaign: the hook taken off, weights rounded, the
residual stream changed around the guard, answers read behind it. Each is of subjects that have a guardrail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from saeguard.attacks import steering, steering_each, weights
from saeguard.attacks.attack import CLEAN
from saeguard.attacks.campaign import Campaign, Job, pairs_of
from saeguard.attacks.catalogue import WHITE_BOX
from saeguard.attacks.reading import AnswerProbe, Lens, at_layer, layers_behind
from saeguard.attacks.success import Pair
from saeguard.attacks.task import Attacked, attacked
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Dev, Item, Task, split
from saeguard.evaluation.tasks.multiple_choice import QuestionItem, question_items
from saeguard.model import decoder_layers


def jobs(names: Sequence[str]) -> list[Job]:
    """One for each name (catalogue.WHITE_BOX)."""
    kinds = {"weights": _weights, "activations": _steered, "reading": _read}
    each = dict.fromkeys(steering_each.SAYS, _steered_each)
    return [Job(name, WHITE_BOX[name], partial(each.get(name, kinds[WHITE_BOX[name]]), name)) for name in names]


def _weights(name: str, campaign: Campaign) -> None:
    if name == "hook-removed":
        unguarded = campaign.records["clean"][campaign.unguarded.name]
        pair = Pair.of(unguarded, [replace(record, triggered=None, statistic=None) for record in unguarded])
        says = "the weights are run without the hook: nothing is left of the guardrail"
        campaign.add(name, WHITE_BOX[name], says, [(subject.name, pair) for subject in campaign.guarded])
    else:
        _quantised(name, int(name.removeprefix("quantised-")), campaign)


def _quantised(name: str, bits: int, campaign: Campaign) -> None:
    loader = weights.quantised(campaign.unguarded.loader, bits)
    task = _clean_form(name, campaign)
    for subject in campaign.guarded:
        assert subject.guardrail is not None
        refused = weights.refusal(subject.guardrail, loader)
        pair = [Subject("unguarded", loader), weights.forced(subject, subject.guardrail, loader)]
        run = campaign.ask(task, pair)
        says = f"weights rounded to {bits} bits, the guardrail as calibrated and its check overridden"
        campaign.add(name, WHITE_BOX[name], says, pairs_of(run), note=refused or "the guardrail did not refuse")


def _steered(name: str, campaign: Campaign) -> None:
    training = _training(name, campaign)
    if not training:
        return
    task = _clean_form(name, campaign)
    on_topic = [item for item in training if item.role == "topic"]
    for subject in campaign.guarded:
        assert subject.guardrail is not None
        kept = campaign.work / "steering"
        other = steering.steered(name, subject, subject.guardrail, on_topic, campaign.config.steering_steps, kept)
        run = campaign.ask(task, [campaign.unguarded, other])
        campaign.add(name, WHITE_BOX[name], steering.SAYS[name], pairs_of(run))


def _steered_each(name: str, campaign: Campaign) -> None:
    config, items = campaign.config, _clean_form(name, campaign).attacked
    for subject in campaign.guarded:
        assert subject.guardrail is not None
        task = steering_each.SteeredEach(name, items, subject, subject.guardrail, config.steps, config.seconds)
        run = campaign.ask(task, [campaign.unguarded, subject])
        campaign.add(name, WHITE_BOX[name], steering_each.SAYS[name], pairs_of(run))


def _read(name: str, campaign: Campaign) -> None:
    training = () if name == "lens" else _training(name, campaign)
    if name != "lens" and not training:
        return
    items = tuple(campaign.chosen())
    for subject in campaign.guarded:
        assert subject.guardrail is not None
        last = len(decoder_layers(subject.loader.loaded[0])) - 1
        layers = tuple(layers_behind(subject.guardrail.layer, last))
        task: Task = Lens(items, layers) if name == "lens" else AnswerProbe(items, training, layers)
        run = campaign.ask(task, [campaign.unguarded, subject])
        first, second = (run.records[one.name] for one in (campaign.unguarded, subject))
        for layer in layers:
            pair = Pair.of(at_layer(first, layer), at_layer(second, layer))
            its_name, says = f"{name}-layer-{layer}", f"{name} after block {layer}"
            campaign.add(its_name, WHITE_BOX[name], says, [(subject.name, pair)])


def _clean_form(name: str, campaign: Campaign) -> Attacked:
    """The questions as they are, as a task of this name."""
    return Attacked(name, tuple(attacked(CLEAN, campaign.chosen(), campaign.config.seed)))


def _training(name: str, campaign: Campaign) -> tuple[QuestionItem, ...]:
    """Dev questions of all domains, never those that are attacked; where there are none, the attack is left out."""
    dev: Dev[Item] = split(question_items(campaign.sets))[0]
    asked = campaign.clean.items
    found = tuple(item for item in dev.items if isinstance(item, QuestionItem) and item.id not in asked)
    if not found:
        campaign.leave_out(name, WHITE_BOX[name], "it needs questions that are not attacked: --split test")
    return found

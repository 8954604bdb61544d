"""Attacks on prompts, as jobs of a campaign."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from saeguard.attacks.attack import Attack
from saeguard.attacks.campaign import CLEAN_TOKENS, Campaign, Job, pairs_of
from saeguard.attacks.task import Attacked, attacked
from saeguard.model import text_config


def jobs(attacks: Sequence[Attack]) -> list[Job]:
    """One for each attack."""
    return [Job(attack.name, attack.family, partial(_attack, attack)) for attack in attacks]


def _attack(attack: Attack, campaign: Campaign) -> None:
    """What stands before the question is read once a group, where no subject has to read whole prompts."""
    model, tokenizer = campaign.unguarded.loader.loaded
    share = not any(subject.whole_prompts for subject in campaign.subjects)
    again = any(rule.reaches_back for its in campaign.guarded if its.guardrail for rule in its.guardrail.rules)
    chosen = campaign.chosen(attack.tokens, attack.shared if share and not again else 0)
    items = attacked(attack, chosen, campaign.config.seed, share=share)
    room = getattr(text_config(model), "max_position_embeddings", None)
    longest = max(len(item.prompt.ids(tokenizer)) for item in items) + CLEAN_TOKENS
    if room is not None and longest > room:
        why = f"about {longest} tokens do not fit into the model's {room}"
        campaign.leave_out(attack.name, attack.family, why)
        return
    run = campaign.ask(Attacked(attack.name, tuple(items)), campaign.subjects)
    campaign.add(attack.name, attack.family, attack.says, pairs_of(run))

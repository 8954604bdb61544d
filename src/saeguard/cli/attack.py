"""`saeguard attack`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeguard.attacks.config import FAMILIES, AttackConfig
from saeguard.cli.judging import add_sources, add_subjects, sources, subjects
from saeguard.cli.options import add_common, add_fields, config_of, console, emit
from saeguard.errors import UsageError

if TYPE_CHECKING:
    from saeguard.attacks.campaign import Campaign
    from saeguard.evaluation.endpoint import ChatEndpoint
    from saeguard.evaluation.sources import TextSet

HELP = "attack a guardrail: what a determined user can get back, as its robustness card"
EXAMPLE = "saeguard attack all --guardrail guardrails/astronomy --out card.json"
ENDPOINT_KEY = "SAEGUARD_ENDPOINT_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attack`."""
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"attacks or families of them: {', '.join(FAMILIES)}; or all")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the attacks and end")
    add_subjects(parser)
    add_sources(parser)
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: as OUT, ending in .work); "
                        "a killed run resumes there")  # fmt: skip
    parser.add_argument("--out", default="attack.json", metavar="FILE", help="the card (default: attack.json); beside "
                        "it as a page (.html) and as Markdown (.md)")  # fmt: skip
    parser.add_argument("--render", metavar="FILE", help="draw the pages of this card again, without running")
    parser.add_argument("--sae", metavar="S", help="for --refit: SAE folder or hub id (default: the one that the "
                        "guardrail names)")  # fmt: skip
    add_common(parser)
    add_fields(parser, AttackConfig, skip=("seed",))


def run(args: argparse.Namespace) -> None:
    """Attack, write the card, show it."""
    from saeguard.attacks.card import make_card, read_card
    from saeguard.evaluation.result import write_result

    if args.list:
        _list(args)
    elif args.render:
        _show(read_card(args.render), args, Path(args.render))
    else:
        card = make_card(_attacked(args))
        write_result(card, args.out)
        _show(card, args, Path(args.out))


def _list(args: argparse.Namespace) -> None:
    from saeguard.attacks.catalogue import every_name

    names = every_name(config_of(AttackConfig, args))
    found = {family: [name for name, its in names.items() if its == family] for family in FAMILIES}
    if args.json:
        emit(found)
        return
    for family, says in FAMILIES.items():
        console().print(f"[bold]{family}[/]: {says}\n  {', '.join(found[family])}")


def _show(card: dict[str, Any], args: argparse.Namespace, path: Path) -> None:
    from saeguard.report.card_page import print_card, write_card

    for suffix in (".html", ".md"):
        written = write_card(card, path.with_suffix(suffix))
        console(quiet=args.json).print(f"Wrote {written}")
    if args.json:
        emit({key: value for key, value in card.items() if key != "records"})
    else:
        print_card(card, console())


def _attacked(args: argparse.Namespace) -> Campaign:
    """The campaign, done."""
    from saeguard.attacks import by_prompt, by_relearning, white_box
    from saeguard.attacks.campaign import Campaign
    from saeguard.attacks.catalogue import WHITE_BOX, lacking, prompt_attacks, wanted
    from saeguard.attacks.curves import Relearner
    from saeguard.attacks.materials import Materials
    from saeguard.attacks.relearning import RELEARNING
    from saeguard.cli.loading import sae_of

    config = config_of(AttackConfig, args)
    if not args.names or not (args.guardrail or args.checkpoint):
        raise UsageError(
            "expected the names of attacks (or all) and --guardrail DIR; saeguard attack --list names them"
        )
    names, endpoint = wanted(args.names, config), _endpoint(config)
    judged = subjects(args)
    guardrails = [subject.guardrail for subject in judged if subject.guardrail]
    found = sources(args, guardrails)
    work = Path(args.work or Path(args.out).with_suffix(".work"))
    loader = judged[0].loader
    searched = (loader, guardrails[0]) if guardrails else None
    materials = Materials.of(found, loader.loaded[1])
    attacks = prompt_attacks(materials, config, work, endpoint=endpoint, searched=searched)
    campaign = Campaign(judged, found.questions, config, work, console(quiet=True).print)
    why_not = {attack.name: lacking(attack, materials, endpoint) for attack in attacks if attack.name in names}
    ready = [attack for attack in attacks if attack.name in why_not and why_not[attack.name] is None]
    trained = [name for name in RELEARNING if name in names]
    not_trained = _not_trained(trained, args.names, found.texts, bool(guardrails))
    _leave_out(campaign, why_not | not_trained, args.names)
    relearner = Relearner(config, found.texts, work / "relearning", partial(sae_of, source=args.sae))
    jobs = by_prompt.jobs(ready)
    jobs += white_box.jobs([name for name in WHITE_BOX if name in names and guardrails])
    jobs += by_relearning.jobs([name for name in trained if name not in not_trained], relearner)
    campaign.run(jobs)
    return campaign


def _leave_out(campaign: Campaign, why_not: Mapping[str, str | None], named: Sequence[str]) -> None:
    """Note and tell what is not made. Raises `UsageError` for what was asked for by its name."""
    from saeguard.attacks.catalogue import every_name

    families = every_name(campaign.config)
    for name, why in why_not.items():
        if why and name in named:
            raise UsageError(f"{name}: {why}")
        if why:
            campaign.leave_out(name, families[name], why)
            console(quiet=True).print(f"Not made: {name}: {why}")


def _not_trained(
    wanted: Sequence[str], named: Sequence[str], texts: Sequence[TextSet], guarded: bool
) -> dict[str, str]:
    """Attacks that train and are not made, with the reason."""
    from saeguard.attacks.relearning import FAMILY, RELEARNING

    found = {}
    for name in wanted:
        why = RELEARNING[name].lacks(texts, guarded=guarded)
        if why is None and name not in named and FAMILY not in named:
            why = f"it trains the model, which takes long: saeguard attack {FAMILY}, or its name"
        if why:
            found[name] = why
    return found


def _endpoint(config: AttackConfig) -> ChatEndpoint | None:
    from saeguard.evaluation.endpoint import ChatEndpoint

    if config.endpoint is None:
        return None
    return ChatEndpoint(config.endpoint, config.endpoint_model, os.environ.get(ENDPOINT_KEY))

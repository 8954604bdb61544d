"""Where topic and retain text could not be told apart, by name: what to look at before a guardrail is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.calibration import Rate
from saeguard.report.formatting import percent
from saeguard.report.view import Share, alpha, chosen_summary
from saeguard.rule import Rule
from saeguard.sample import FORGET

FOREIGN = 0.02
AMONG = 0.1
"""Shares of documents on the wrong side, of retain and of forget text. Worth a look is what surely is above them: the
lower end of the interval. docs/gates.md has the shares of seven textbooks, with and without foreign text."""
APART = 0.5
"""Of the topic, what a gate that tells two corpora apart catches at least."""
NAMED = 3


def overlaps(rule: Rule) -> list[str]:
    """Sentences, each naming a corpus; none where all is well or nothing was measured."""
    return [*_foreign(rule), *_inseparable(rule)]


def _foreign(rule: Rule) -> list[str]:
    """Corpora of which many documents read like the other side: the topic, then retain corpora, the most first."""
    found, other = rule.evidence.get("contamination") or {}, rule.evidence.get("threshold_other_way")
    shares = {name: Share.of(name, entry) for name, entry in found.get("shares", {}).items() if name != FORGET}
    worst = sorted((name for name in shares if shares[name].low > FOREIGN), key=lambda name: -shares[name].rate)
    false: Mapping[str, Any] = (chosen_summary(rule) or {}).get("false_positives", {})
    near = (rule.evidence.get("config") or {}).get("near_retain") or ()
    left_out = other is not None and not other["quarantine"]
    among = Share.of(FORGET, found.get("forget_among_retain"))
    says = [_foreign_topic(among)] if among.low > AMONG else []
    return says + [_foreign_retain(shares[name], left_out and name not in near, false.get(name)) for name in worst]


def _foreign_topic(share: Share) -> str:
    return (
        f"{_documents(share)} of the topic read like retain text: they score below the twentieth of it that is most "
        "like the topic. The most suspect are listed below: take out what is not about the topic, or it is learned as "
        "the topic. Where all of it is, retain text lies close."
    )


def _foreign_retain(share: Share, left_out: bool, false: Mapping[str, Any] | None) -> str:
    says = f"{_documents(share)} of {share.name} read like the topic and were "
    if left_out:
        says += "left out of calibration, so alpha is no promise for text like them"
        says += f"; in held-out text {percent(false['rate'])} of its windows trigger. " if false else ". "
    else:
        says += "kept, so that they raise the threshold. "
    says += "They are listed below: take out of it what is about the topic"
    return says + (f"; to spare the rest, fit with --near-retain {share.name}." if left_out else ".")


def _documents(share: Share) -> str:
    return f"{share.percent} of the documents ({share.hits} of {share.n})"


def _inseparable(rule: Rule) -> list[str]:
    """Corpora that alone would keep the gate from catching half of the topic, the worst first."""
    level, summary = alpha(rule), chosen_summary(rule) or {}
    false: Mapping[str, Any] = summary.get("false_positives", {})
    of_topic = (summary.get("caught") or {}).get("n", 0)
    caught = [
        Share.of(bound["group"], Rate(bound["caught"], of_topic).as_dict())
        for bound in summary.get("bounds", ())
        if of_topic and bound["group"] in false and "caught" in bound
    ]
    near = sorted((share for share in caught if share.rate < APART), key=lambda share: share.rate)
    if level is None or not near:
        return []
    says = [
        f"The gate cannot tell {share.name} from the topic: at {percent(level)} of {share.name} it catches "
        f"{share.percent} of the topic ({share.interval})."
        for share in near[:NAMED]
    ]
    if len(near) > NAMED:
        says[-1] += f" {len(near) - NAMED} more corpora are as near."
    says[-1] += " Allow more (--alpha), or leave out what may be hit; docs/gates.md says what else was tried."
    return says

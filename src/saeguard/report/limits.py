"""What a guardrail does not do, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from saeguard.report.formatting import percent, visible
from saeguard.report.view import alpha, chosen_summary, gate_rows
from saeguard.rule import Rule

CONVERSATION = 4000


def limits(rule: Rule) -> list[str]:
    """Sentences for the end of a report, each true of this rule."""
    says = [
        "It does not remove anything from the model's weights. Whoever holds them can run the model without it.",
        "It acts on this exact model and tokenizer only; after any fine-tuning it has to be fitted again.",
        *_measured_limits(rule),
        "It was measured on ordinary text. Someone who sets out to get round it, with other languages, ciphers or "
        "misspellings, may succeed, and with roundabout wording, which describes the topic without its words, is "
        "likely to. Test that with `saeguard attack`.",
    ]
    if rule.gate.always(rule.threshold):
        says.append("It has no gate: it acts on every text, at the tokens where one of its features is active.")
    if rule.action == "clamp":
        says.append(
            "It does not make the model refuse. A triggered answer on the topic becomes vague, wrong or broken; "
            "a correct fact can still slip out."
        )
    if rule.action == "monitor":
        says.append("It blocks nothing: it only records that a sequence has triggered.")
    if rule.action == "clamp" and rule.reaches_back:
        says.append("What it has said before the trigger stays said.")
    elif rule.action == "clamp" and rule.gate.moment == "running":
        says.append("Tokens that come before the trigger stay as they are.")
    if rule.gate.latch and rule.action != "monitor":
        says.append("Once triggered, a sequence stays so to its end, also where the talk turns to something else.")
    if rule.gate.kind == "probe":
        says.append(
            "The decision is not explained by the features listed here: a linear probe makes it, "
            "the features are what is clamped."
        )
    return says


def _measured_limits(rule: Rule) -> list[str]:
    rows = gate_rows(rule)
    if not rows or not rows[0].chosen:
        return ["It carries no figures from held-out text, so nothing is known here of what it catches or disturbs."]
    caught, level = rows[0].caught, alpha(rule)
    smallest = min(rows[0].false_positives, key=lambda share: share.n, default=None)
    lengths = " and ".join(length for length, _, _ in rows[0].by_length)
    says = [
        f"It does not catch everything: {caught.n - caught.hits} of {caught.n} held-out topic windows passed unseen. "
        if caught.n
        else "How much of the topic it catches was not measured, for want of forget text: try it on some before use. "
    ]
    says[0] += f"Text of other lengths than those tested (up to {lengths} tokens) may fare otherwise."
    if level is not None:
        says.append(
            f"It does not promise silence on all other text. At most {percent(level)} of new windows trigger, on "
            "average, for text of the same kinds as the retain corpora; for any other kind nothing is promised."
        )
    if alarms := (chosen_summary(rule) or {}).get("false_alarms"):
        says.append(_in_long_text({visible(name): found["per_1000"] for name, found in alarms.items()}))
    if smallest is not None and smallest.n < 100:
        says.append(
            f"The figures are not exact: the smallest corpus has {smallest.n} held-out windows, so read the intervals."
        )
    return says


def _in_long_text(per_1000: Mapping[str, float]) -> str:
    name, rate = max(per_1000.items(), key=lambda pair: pair[1])
    share = -math.expm1(-rate * CONVERSATION / 1000)
    return (
        f"In long text it has many chances to be wrong: in held-out text of {name}, the worst corpus, {rate:.2g} false "
        f"alarms in 1,000 tokens, at which rate {percent(share)} of conversations of {CONVERSATION:,} tokens trigger. "
        "`fit --per-1000` sets a threshold by that."
    )

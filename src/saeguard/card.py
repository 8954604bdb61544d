"""The card that travels with a guardrail: what it is, how good it is, how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saeguard.guardrail import Guardrail
    from saeguard.rule import Rule


def model_card(guardrail: Guardrail) -> str:
    """A README for a guardrail's folder, in the form the Hugging Face hub shows."""
    rules = "\n".join(_rule_section(rule) for rule in guardrail.rules)
    model = guardrail.model["name"] or guardrail.model["config"]["model_type"]
    return f"""---
library_name: saeguard
tags: [saeguard, unlearning, sparse-autoencoder]
---
# Guardrail for {model}, layer {guardrail.layer}

Made with [saeguard](https://arxiv.org/abs/2504.08192). It acts only on the exact model and tokenizer it was fitted
on, and refuses any other. Anyone who holds the model's weights can run it without the guardrail.

```python
from saeguard import Guardrail
with Guardrail.from_pretrained("THIS_FOLDER").attach(model, tokenizer) as guard:
    model.generate(**inputs)
    print(guard.verdicts)
```
{rules}"""


def _rule_section(rule: Rule) -> str:
    chosen = rule.evidence.get("gates", {}).get(rule.evidence.get("chosen", ""), {})
    lines = [
        f"## {rule.name}",
        f"{len(rule.features)} SAE features, gate `{rule.gate.kind}`, threshold {rule.threshold:.4g}, "
        f"action `{rule.action}`.",
    ]
    if chosen:
        lines += ["", "| held-out text | share triggered | n |", "|---|---|---|"]
        rows = {"forget": chosen["caught"]} | chosen["false_positives"]
        lines += [
            f"| {name} | {row['rate']:.3f} | {row['n']} |" if row else f"| {name} | not measured: no forget text | 0 |"
            for name, row in rows.items()
        ]
    return "\n".join(lines) + "\n"

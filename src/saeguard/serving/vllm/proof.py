"""The proof before serving: through the real engine, a text of the topic fires and an ordinary one does not.

A hook on the wrong layer, half of the residual stream, tokens given to the wrong request or weights other than those
calibrated on would all let the engine run and the guard sleep. One text each of what must and must not happen
shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saeguard.errors import ProofError
from saeguard.online.intervention import Verdict


def check_proof(name: str, verdicts: Sequence[Verdict]) -> None:
    """Raises `ProofError` unless the first of the verdicts on `ProofTexts.all()` triggered and some other did not."""
    figures: Mapping[str, Any] = {"statistics": [round(v.statistic, 3) for v in verdicts]}
    fires, *others = (verdict.triggered for verdict in verdicts)
    if not fires or (others and all(others)):
        raise ProofError.mismatch(
            f"start-up proof of guardrail {name} (threshold {verdicts[0].threshold:.3f}, {figures})",
            found="the topic's text did not fire" if not fires else "every ordinary text fired",
            expected="fires on the topic, silent on ordinary text",
            fix="The engine computes another residual stream than the one the guardrail was calibrated on.",
        )

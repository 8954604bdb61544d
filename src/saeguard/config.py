"""Every choice of `fit`, `refit` and `train-sae`, with its default and its help text, and the presets.

The command line is generated from these fields: a choice is written down once. Nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from saeguard.choices import Action, ClampKind, GateChoice, GivenFeatures, Moment, Reach, TopKMode
from saeguard.options import option

if TYPE_CHECKING:
    from saeguard.calibration import Method
    from saeguard.selection import SelectionRule


@dataclass(frozen=True)
class FitConfig:
    """How a guardrail is fitted. The defaults are the preset `default`."""

    name: str = option("forget", "name of the rule, shown in verdicts")
    n: int = option(40, "features selected")
    p_ratio: float = option(95.0, "percentile of the importance ratio that a feature must reach")
    score: Literal["second_moment", "squared_mean"] = option(
        "second_moment", "feature score: the paper's, or its code's"
    )
    retain_score: Literal["worst", "pooled"] = option("worst", "retain score over several corpora")
    retain_rate: float | None = option(
        None,
        "take features that fire at no more than this share of retain tokens, in place of p_ratio (Farrell et al.)",
    )
    floor: float = option(1e-4, "smallest retain score in the ratio, relative to the largest")
    gate: GateChoice = option("auto", "what decides; auto: evidence, unless another is better beyond its interval")
    accumulate: Literal["cusum", "mean"] = option("cusum", "how token scores become the statistic (the paper: mean)")
    drift: float | None = option(
        None, "what cusum takes off each score, in units of the topic's mean score; default: the best of a few"
    )
    moment: Moment = option("running", "decide at every token, or once for all tokens of a forward pass (the paper)")
    latch: bool = option(True, "once triggered, triggered to the end")
    alpha: float = option(0.05, "false positives allowed in each retain corpus (conformal threshold)")
    per_1000: float | None = option(
        None, "also allow only so many false alarms in 1,000 tokens of each retain corpus: for long conversations"
    )
    p_dyn: float | None = option(None, "use this percentile of the retain statistics instead of alpha (the paper: 95)")
    threshold: float | None = option(None, "use this threshold, without calibration; below 0 density always triggers")
    clamp: ClampKind = option("dense", "at hot tokens clamp all features, or only the active ones")
    strength: float = option(0.5, "clamp value in units of the median residual norm")
    c: float | None = option(None, "clamp value in units of feature activation instead of --strength (the paper: 500)")
    action: Action = option("clamp", "what a trigger does")
    reach: Reach = option(
        "all",
        "which hot tokens of a triggered sequence are clamped: all, for which what was read before the trigger is read "
        "again, or those from the trigger on (the paper)",
    )
    lengths: tuple[int, ...] = option((32, 64, 256), "tokens of the windows that text is cut into")
    chat: bool | None = option(None, "wrap every other document in the chat template; default: where there is one")
    sample: int = option(60_000, "tokens kept of each corpus for fitting and calibrating gates")
    quarantine: bool = option(True, "leave out retain text that looks like the topic, and the reverse; it is listed")
    near_retain: tuple[str, ...] | None = option(
        None, "retain corpora beside the topic: nothing of them is left out, and they weigh more in the learned gates"
    )
    topk: TopKMode = option("exact", "TopK SAEs: carry the whole encoder, or fixed thresholds with measured agreement")
    as_authors: bool = option(False, "round and count exactly as the authors' code does")
    force: bool = option(False, "fit although the SAE does not fit (see doctor); the guardrail records it")
    seed: int = option(0, "seed of everything random")
    given: GivenFeatures | None = None
    """Features to use in place of selection."""

    @property
    def selection(self) -> SelectionRule:
        """The selection rule."""
        from saeguard.selection import SelectionRule

        return SelectionRule(
            self.n, self.p_ratio, self.score, self.retain_score, self.floor, self.as_authors, self.retain_rate
        )

    @property
    def method(self) -> Method:
        """The calibration method."""
        from saeguard.calibration import Conformal, Fixed, Percentile

        if self.threshold is not None:
            return Fixed(self.threshold)
        return Conformal(self.alpha, self.per_1000) if self.p_dyn is None else Percentile(self.p_dyn)

    @property
    def comparing(self) -> Method:
        """By which drifts are compared: each at its own calibrated threshold. At one fixed threshold for all the least
        drift would trigger soonest, on the topic and on everything else."""
        return replace(self, threshold=None).method

    def as_dict(self) -> dict[str, Any]:
        """For the artifact, which says elsewhere which features were given."""
        named = {name: value for name, value in asdict(self).items() if name != "given"}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in named.items()}


PRESETS: dict[str, FitConfig] = {
    "default": FitConfig(),
    "paper": replace(
        FitConfig(), n=20, score="squared_mean", retain_score="pooled", gate="density", accumulate="mean",
        moment="block", p_dyn=95.0, clamp="dense", c=500.0, reach="onward", lengths=(1024,), chat=False,
        quarantine=False, as_authors=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RefitConfig:
    """What of a guardrail is fitted anew on a changed model; its other settings are those it was fitted with."""

    only: Literal["threshold"] | None = option(
        None, "threshold: keep features, gate weights and clamp; default: select and fit all of it anew"
    )
    force: bool = option(False, "go on although the SAE no longer fits (see doctor); the guardrail records it")


@dataclass(frozen=True)
class SAETraining:
    """How an SAE is trained."""

    width: int = option(4608, "number of features, d_sae")
    k: int = option(32, "mean number of active features a token, L0")
    token_passes: int = option(2_500_000, "tokens seen, each token counted every time it is seen")
    batch: int = option(2048, "tokens in a step")
    learning_rate: float = option(1e-3, "peak learning rate")
    seed: int = 0

    def digest(self) -> str:
        """Names these settings: a training goes on only with those it began with."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

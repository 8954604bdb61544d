"""The settings of every method with their defaults and help texts; the command line is generated from them.

Nothing heavy here. A method's settings are a frozen dataclass of `option` fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.choices import ClampKind
from saeguard.options import option

N = "features selected"
STRENGTH = "clamp value in units of the median residual norm"
ALPHA = "false positives allowed in each retain corpus (conformal threshold)"
ACCUMULATE = "how token scores become the statistic"


@dataclass(frozen=True)
class DSG:
    """Of `dsg`."""

    n: int = option(20, N)
    p_ratio: float = option(95.0, "percentile of the importance ratio that a feature must reach")
    strength: float = option(5.0, STRENGTH)


@dataclass(frozen=True)
class Evidence:
    """Of `evidence`."""

    n: int = option(40, N)
    strength: float = option(0.5, STRENGTH)


@dataclass(frozen=True)
class ProbeClamp:
    """Of `probe`."""

    n: int = option(40, N)
    accumulate: Literal["cusum", "mean"] = option("cusum", ACCUMULATE)
    strength: float = option(0.5, STRENGTH)


@dataclass(frozen=True)
class ProbeRefuse:
    """Of `probe-refuse`."""

    n: int = option(40, N)
    accumulate: Literal["cusum", "mean"] = option("cusum", ACCUMULATE)
    alpha: float = option(0.05, ALPHA)


@dataclass(frozen=True)
class Static:
    """Of `static`."""

    n: int = option(20, N)
    retain_rate: float = option(0.01, "largest share of retain tokens at which a selected feature may fire")
    clamp: ClampKind = option("active", "clamp the active ones of the features, or all at tokens where one is active")
    strength: float = option(0.5, STRENGTH)


@dataclass(frozen=True)
class Conditional:
    """Of `conditional`."""

    n: int = option(20, N)
    strength: float = option(0.5, STRENGTH)


@dataclass(frozen=True)
class ConditionalRefuse(Conditional):
    """Of `conditional-refuse`."""

    boost: float = option(1.0, "what the refusal feature is given, as a share of what each active feature is moved by")
    refusal_feature: int | None = option(None, "feature that stands for refusal (default: found on some refusals)")


@dataclass(frozen=True)
class Prompted:
    """Of `prompt-refuse`, and of every method whose gate is a classifier of prompts."""

    encoder: str | None = option(None, "sentence-embedding model, a hub id or a folder (default: TF-IDF of words)")
    regularisation: float = option(10.0, "C of the logistic regression: larger is freer")
    alpha: float = option(0.05, ALPHA)


@dataclass(frozen=True)
class PromptCorrupt(Prompted):
    """Of `prompt-corrupt`."""

    strength: float = option(1.0, "standard deviation of the noise, in units of that of the embedding matrix")

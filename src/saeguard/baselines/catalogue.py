"""What a method is, and all that there are.

A method is a function `run(trial) -> None`, in a file of this package, that writes `trial.out`: the folder of a
guardrail, of a prompt gate, or of a model (whole, or a PEFT adapter). `eval` judges each of them. Nothing heavy is
imported here: a method's file is, when it runs.
"""

from __future__ import annotations

import importlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saeguard.baselines import settings
from saeguard.baselines import weight_settings as weights
from saeguard.baselines.grids import SMALL
from saeguard.errors import UsageError

if TYPE_CHECKING:
    from saeguard.sae.autoencoder import SparseAutoencoder

Need = Literal["retain", "sae"]


@dataclass(frozen=True)
class Trial:
    """One method, with one choice of settings, to be fitted.

    `load` gives model and tokenizer, new ones at every call, so that a method may change them. `forget` and each of
    `retain` are files that `Corpus.of` reads. `work` may keep what other trials can use again.
    """

    settings: Any
    load: Callable[[], tuple[Any, Any]]
    forget: str
    retain: Mapping[str, str]
    sae: SparseAutoencoder | None
    layer: int | None
    out: Path
    work: Path
    seed: int = 0
    force: bool = False
    """Fit although the SAE does not fit the model."""
    source: str | None = None
    """The model's hub id or folder where it is known, to see before loading whether a training fits."""
    device: str = "auto"


@dataclass(frozen=True)
class Cost:
    """What it took to fit; `peak_memory_mb` is that of the whole process so far."""

    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Baseline:
    """A method: what it does, what it needs beside forget text, its settings, and the values that `compare` tries."""

    name: str
    summary: str
    module: str
    settings: type
    grid: Mapping[str, Sequence[Any]]
    needs: frozenset[Need] = field(default=frozenset({"retain", "sae"}))
    trains_weights: bool = False

    def run(self, trial: Trial) -> Cost:
        """Fit and write `trial.out`. Raises `UsageError` where something that is needed is missing."""
        if "retain" in self.needs and not trial.retain:
            raise UsageError(f"{self.name} needs texts that must stay as they are: --retain NAME=FILE …")
        if "sae" in self.needs and trial.sae is None:
            raise UsageError(f"{self.name} needs a sparse autoencoder: --sae S")
        started = time.perf_counter()
        importlib.import_module(f"saeguard.baselines.{self.module}").run(trial)
        return Cost(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def folder_bytes(folder: Path) -> int:
    """The size of all that a method wrote: what there is to ship."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _trained(name: str, summary: str, module: str, kind: type[weights.Settings], *needs: Need) -> Baseline:
    """A method that changes weights."""
    return Baseline(name, summary, module, kind, SMALL[kind], frozenset(needs), trains_weights=True)


BASELINES: dict[str, Baseline] = {
    one.name: one
    for one in (
        Baseline(
            "dsg", "Dynamic SAE Guardrails as in the paper: density gate over the whole prompt, dense clamp",
            "guarded", settings.DSG, {"n": (10, 20), "p_ratio": (90.0, 95.0), "strength": (0.5, 5.0)},
        ),
        Baseline(
            "evidence", "this package's explainable gate, learned weights over SAE features, with the clamp",
            "guarded", settings.Evidence, {"n": (20, 40), "strength": (0.25, 0.5, 1.0, 2.0)},
        ),
        Baseline(
            "probe", "a linear probe on the residual stream decides, SAE features are clamped",
            "guarded", settings.ProbeClamp, {"accumulate": ("cusum", "mean"), "strength": (0.25, 0.5, 1.0, 2.0)},
        ),
        Baseline(
            "probe-refuse", "a linear probe on the residual stream decides, the answer is a refusal",
            "guarded", settings.ProbeRefuse, {"accumulate": ("cusum", "mean"), "alpha": (0.05, 0.1, 0.15, 0.2)},
        ),
        Baseline(
            "static", "SAE clamping that is always on, features by retain threshold (Farrell et al., arXiv 2410.19278)",
            "guarded", settings.Static,
            {"retain_rate": (0.005, 0.01), "clamp": ("active", "dense"), "strength": (0.5, 2.0)},
        ),
        Baseline(
            "conditional", "features are clamped at the tokens where they are active, without a gate on the sequence "
            "(Khoriaty et al., arXiv 2503.11127)",
            "guarded", settings.Conditional, {"n": (10, 20), "strength": (0.25, 0.5, 1.0, 2.0)},
        ),
        Baseline(
            "conditional-refuse", "the same, and a feature that stands for refusal is raised at those tokens "
            "(the refusal clamp of Khoriaty et al.)",
            "refusal_clamp", settings.ConditionalRefuse,
            {"n": (10, 20), "strength": (0.5, 2.0), "boost": (0.5, 2.0)},
        ),
        Baseline(
            "prompt-refuse", "a classifier of the prompt's text decides, the answer is a refusal",
            "prompted", settings.Prompted, {"regularisation": (0.1, 1.0, 10.0, 100.0), "alpha": (0.05, 0.1)},
            needs=frozenset({"retain"}),
        ),
        Baseline(
            "prompt-corrupt", "a classifier of the prompt's text decides, the prompt's embeddings are corrupted "
            "(ECO, Liu et al., arXiv 2406.07933)",
            "prompted", settings.PromptCorrupt, {"strength": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)},
            needs=frozenset({"retain"}),
        ),
        _trained(
            "grad-ascent", "gradient ascent on forget text until retain text suffers",
            "gradient_ascent", weights.GradientAscent,
        ),
        _trained(
            "grad-diff", "gradient ascent on forget text, descent on retain text (arXiv 2203.12817)",
            "gradient_difference", weights.GradientDifference, "retain",
        ),
        _trained(
            "npo", "negative preference optimisation (arXiv 2404.05868)",
            "npo", weights.NPO, "retain",
        ),
        _trained(
            "simnpo", "negative preference optimisation without a reference model (arXiv 2410.07163)",
            "simnpo", weights.SimNPO, "retain",
        ),
        _trained(
            "rmu", "the residual stream of forget text is sent in a random direction (arXiv 2403.03218)",
            "rmu", weights.RMU, "retain",
        ),
        _trained(
            "scrub", "a student that leaves its teacher on forget text and stays with it elsewhere (arXiv 2302.09880)",
            "scrub", weights.SCRUB, "retain",
        ),
        _trained(
            "ssd", "selective synaptic dampening: weights that matter to forget text shrink (arXiv 2308.07707)",
            "ssd", weights.SSD, "retain",
        ),
        _trained(
            "task-vector", "fine-tuning on forget text, taken off the weights (arXiv 2212.04089)",
            "task_vector", weights.TaskVector,
        ),
        _trained(
            "dare", "the same, most of the difference dropped and the rest rescaled (arXiv 2311.03099)",
            "dare", weights.DARE,
        ),
        _trained(
            "crisp", "SAE features of the topic are trained away by adapters (arXiv 2508.13650)",
            "crisp", weights.CRISP, "retain", "sae",
        ),
    )
}  # fmt: skip

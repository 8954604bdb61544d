"""From figures to findings: one small function a check. Why the bounds are where they are: docs/doctor.md."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

from saeguard.doctor.figures import Corrections, Features, Figures, Trial
from saeguard.doctor.finding import Finding

NOTHING = 0.0
"""Explained variance of the mean of the stream, a constant: an SAE below it is worse than none."""
LITTLE = 0.5
BETTER = 1.1
"""A correction counts if it leaves this many times less variance unexplained, with no more features active ..."""
MORE_ACTIVE = 1.1
FAR_BETTER = 2.0
"""... or this many times less, with any number."""
LEAST_GAIN = 0.02
SCALE_BAND = 1.25
ALIGNED = 0.5
L0_RATIO = 2.0
CROWDED = 0.2
DENSE = 0.05
SILENT = 0.9
CHAT_WORSE = 1.25
RECOVERED = 0.8
OVERLAP = 0.9
FEW_TOKENS = 1_000
MASSIVE = 0.1
LOUD = 2.0


def findings_of(figures: Figures) -> list[Finding]:
    """All findings of the measured figures."""
    return [finding for check in CHECKS if (finding := check(figures)) is not None]


def explained(figures: Figures) -> Finding | None:
    """Is enough of the ordinary tokens explained, over all texts?"""
    found = figures.whole.ordinary
    if found >= LITTLE:
        return None
    return Finding(
        "mismatch" if found < NOTHING else "warning", "explained variance of ordinary tokens", f"{found:.2f}",
        f"{LITTLE:g} or more" if found >= NOTHING else f"above {NOTHING:g}, which a constant vector reaches",
        "Check that the SAE was trained on this model, layer and hook point, and how its weights were converted.",
    )  # fmt: skip


def explained_in_each(figures: Figures) -> Finding | None:
    """Is there a text that the SAE knows nothing of, though it knows others?"""
    worst = min(figures.texts, key=lambda name: figures.texts[name].ordinary)
    found = figures.texts[worst].ordinary
    if len(figures.texts) == 1 or found >= NOTHING or figures.whole.ordinary < NOTHING:
        return None
    return Finding(
        "warning", f"explained variance of the text {worst!r}", f"{found:.2f}", f"above {NOTHING:g}",
        "Features say little about such text: use an SAE trained on some of its kind.",
    )  # fmt: skip


def correction(figures: Figures) -> Finding | None:
    """Would one change make the SAE fit clearly better? Only the change that explains most is reported."""
    tried = figures.corrections
    # Streams grow from layer to layer: another layer has to beat this one with its norms matched too.
    pairs = ((tried.as_is, tried.scale), (tried.as_is, tried.b_dec), (tried.scale, tried.layer))
    able = [after for before, after in pairs if improves(before, after)]
    if not able:
        return None
    best = max(able, key=lambda trial: trial.explained_variance)
    return {"scale": _scale, "b_dec": _b_dec, "layer": _layer}[best.cause](best, tried)


def improves(before: Trial, after: Trial) -> bool:
    """Whether a trial explains clearly more, and not only by letting more features fire."""
    left, less = 1 - before.explained_variance, 1 - after.explained_variance
    if after.cause == "scale" and abs(log2(after.value)) < log2(SCALE_BAND):
        return False
    if after.explained_variance < NOTHING or left - less < LEAST_GAIN:
        return False
    return left >= FAR_BETTER * less or (left >= BETTER * less and after.l0 <= MORE_ACTIVE * before.l0)


def _scale(best: Trial, tried: Corrections) -> Finding:
    return Finding(
        "mismatch", "scale of the SAE's input",
        f"{tried.as_is.explained_variance:.2f} of the variance explained as it is, {best.explained_variance:.2f} with "
        f"the input times {best.value:.3g}",
        "1, within a quarter",
        "The SAE was trained on normalised activations: fold the factor into its weights, and convert it again.",
    )  # fmt: skip


def _b_dec(best: Trial, tried: Corrections) -> Finding:
    missing = best.value < 0
    return Finding(
        "mismatch", "b_dec at the SAE's input",
        f"{tried.as_is.explained_variance:.2f} of the variance explained as it is, {best.explained_variance:.2f} "
        f"with b_dec {'subtracted' if missing else 'not subtracted'}",
        "b_dec treated as in training",
        f"Set apply_b_dec_to_input to {str(missing).lower()} in the SAE's file, or convert it again.",
    )  # fmt: skip


def _layer(best: Trial, tried: Corrections) -> Finding:
    return Finding(
        "mismatch", "layer that explains most",
        f"layer {best.value:g} with {best.explained_variance:.2f} of the variance, against "
        f"{tried.as_is.explained_variance:.2f} here",
        "this layer",
        f"Use layer {best.value:g}, and check that layers are counted from 0 and the hook point is the SAE's.",
    )  # fmt: skip


def alignment(figures: Figures) -> Finding | None:
    """Do encoder columns point where decoder rows do?"""
    features = figures.features
    if features.aligned is None or features.aligned >= ALIGNED:
        return None
    return Finding(
        "mismatch", "encoder and decoder",
        f"{features.aligned:.0%} of encoder columns point towards their decoder row (median cosine "
        f"{features.alignment:.2f})",
        f"{ALIGNED:.0%} or more",
        "The weights are shuffled, or of two SAEs: fetch or convert them again.",
    )  # fmt: skip


def declared_l0(figures: Figures) -> Finding | None:
    """Do as many features fire as the file says?"""
    said, found = figures.declared_l0, figures.whole.l0
    if said is None or said / L0_RATIO <= found <= said * L0_RATIO:
        return None
    return Finding(
        "warning", "active features a token (L0)", f"{found:.1f}", f"about {said:g}, which its file says",
        "Check the scale of the input and the thresholds; on text unlike the training text L0 differs too.",
    )  # fmt: skip


def crowded(figures: Figures) -> Finding | None:
    """Is the code sparse at all?"""
    share, features = figures.whole.l0 / figures.features.d_sae, figures.features
    if share <= CROWDED and features.dense <= DENSE:
        return None
    return Finding(
        "warning", "sparsity",
        f"{share:.1%} of the features active at a token, {features.dense:.1%} of them at more than half of the tokens",
        f"at most {CROWDED:.0%} and {DENSE:.0%}",
        "Features that fire everywhere tell no topic: use a sparser SAE, or check the scale of its input.",
    )  # fmt: skip


def silent(figures: Figures) -> Finding | None:
    """Are nearly all features silent?"""
    features: Features = figures.features
    if features.silent <= SILENT:
        return None
    return Finding(
        "warning", "silent features", f"{features.silent:.0%} on {features.tokens:,} tokens", f"at most {SILENT:.0%}",
        "Rare features need more text to be seen (--tokens); if it stays so, they are dead.",
    )  # fmt: skip


def chat(figures: Figures) -> Finding | None:
    """Does the SAE still explain text in the chat template?"""
    if figures.chat is None:
        return None
    plain, found = figures.whole.ordinary, figures.chat.ordinary
    if 1 - found <= CHAT_WORSE * (1 - plain) or plain - found < LEAST_GAIN:
        return None
    return Finding(
        "warning", "explained variance in the chat template", f"{found:.2f}", f"about {plain:.2f}, that of plain text",
        "The SAE was not trained on chats, perhaps on the base model: see how well the gate does on chat text.",
    )  # fmt: skip


def loss_recovered(figures: Figures) -> Finding | None:
    """Does the model still work on what the SAE rebuilds?"""
    if figures.loss_recovered is None or figures.loss_recovered >= RECOVERED:
        return None
    return Finding(
        "warning", "loss recovered with the SAE in the model's place", f"{figures.loss_recovered:.2f}",
        f"{RECOVERED:g} or more", "What it explains is not what the model uses: a clamp may do little.",
    )  # fmt: skip


def precision(figures: Figures) -> Finding | None:
    """Does another dtype of the model change which features fire?"""
    worst = min(figures.precision, key=lambda one: one.jaccard, default=None)
    if worst is None or worst.jaccard >= OVERLAP:
        return None
    return Finding(
        "warning", f"features active in {worst.dtype} and in {worst.other}", f"{worst.jaccard:.0%} in common",
        f"{OVERLAP:.0%} or more", f"Fit and serve in one dtype ({worst.dtype} here).",
    )  # fmt: skip


def few_tokens(figures: Figures) -> Finding | None:
    """Is there enough text to say much?"""
    if figures.whole.tokens >= FEW_TOKENS:
        return None
    return Finding(
        "note", "tokens examined", f"{figures.whole.tokens:,}", f"{FEW_TOKENS:,} or more",
        "Shares of features are rough, and most rare features were not seen: give more text.",
    )  # fmt: skip


def massive(figures: Figures) -> Finding | None:
    """Do a few tokens or dimensions hold much of the variance?"""
    norms = figures.norms
    if norms.massive_variance < MASSIVE and not norms.massive_dimensions:
        return None
    dimensions = ", ".join(f"{share:.0%} in dimension {i}" for i, share in norms.massive_dimensions.items())
    return Finding(
        "note", "massive activations",
        f"{norms.massive_variance:.0%} of the variance is in {norms.massive_tokens:.1%} of the tokens"
        + (f"; {dimensions}" if dimensions else ""),
        "variance spread over tokens and dimensions",
        "Look at the explained variance of ordinary tokens: the figure over all tokens flatters the SAE.",
    )  # fmt: skip


def loud_tokens(figures: Figures) -> Finding | None:
    """Do first or special tokens stand out?"""
    norms = figures.norms
    loud = {"first tokens": norms.first, "special tokens": norms.special or 0.0}
    said = [f"{name} {norm / norms.median:.1f}" for name, norm in loud.items() if norm > LOUD * norms.median]
    if not said:
        return None
    return Finding(
        "note", "norms, in units of the median", ", ".join(said), f"at most {LOUD:g}",
        "Nothing: these tokens are masked wherever tokens are counted.",
    )  # fmt: skip


CHECKS: tuple[Callable[[Figures], Finding | None], ...] = (
    correction, alignment, explained, explained_in_each, declared_l0, crowded, silent, chat, loss_recovered, precision,
    few_tokens, massive, loud_tokens,
)  # fmt: skip

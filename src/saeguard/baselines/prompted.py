"""`prompt-refuse` and `prompt-corrupt`: fit and calibrate a classifier of prompts on windows of text.

As in `fit`: the same windows, some of them in the chat template; documents on the wrong side of the cross-fitted scores
are left out of fitting and calibration; the threshold is the largest conformal bound of the retain corpora and window
lengths; rates are of the test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saeguard.baselines import settings
from saeguard.baselines.catalogue import Trial
from saeguard.baselines.prompt_gate import PromptGate
from saeguard.baselines.prompts import Sentences, Tfidf, cross_fitted, fit_classifier
from saeguard.calibration import Conformal, calibrate, rate_above
from saeguard.contamination import contamination
from saeguard.corpus import Corpus, Split, check_disjoint
from saeguard.errors import TooFewSequencesError
from saeguard.proof import Read, two_of
from saeguard.sample import FORGET
from saeguard.windows import Windower

CROSS_FITTED = 1.0
"""The C of the classifier that looks for documents on the wrong side."""


@dataclass(frozen=True)
class Prompt:
    """A window as the classifier reads it, `key` its document."""

    key: tuple[str, int]
    split: Split
    length: int
    text: str

    @property
    def forget(self) -> bool:
        """Whether it is of the topic."""
        return self.key[0] == FORGET


def run(trial: Trial) -> None:
    """Fit the prompt gate and write its folder. Raises a `GuardrailError` by cause."""
    _, tokenizer = trial.load()
    corpora = {FORGET: trial.forget, **trial.retain}
    prompts = [prompt for name, file in corpora.items() for prompt in read_prompts(name, file, tokenizer)]
    _check(prompts, corpora)
    fit_prompt_gate(prompts, trial.settings, trial.seed).save_pretrained(trial.out)


def read_prompts(name: str, file: str, tokenizer: Any) -> list[Prompt]:
    """The windows of a corpus, in the text that the tokenizer gives back for them."""
    windower = Windower(tokenizer, chat=tokenizer.chat_template is not None)
    return [
        Prompt((name, one.document), one.split, one.length, tokenizer.decode(one.ids, skip_special_tokens=True))
        for document in Corpus.of(name, "retain", file).documents()
        for one in windower.cut(document)
    ]


def fit_prompt_gate(prompts: Sequence[Prompt], chosen: settings.Prompted, seed: int) -> PromptGate:
    """Learn on the fit split, calibrate on the calibration split, measure on the test split."""
    known = [prompt for prompt in prompts if prompt.split != "test"]
    names = [f"{name}/{number}" for name, number in (prompt.key for prompt in known)]
    scores = cross_fitted([p.text for p in known], [p.forget for p in known], names, CROSS_FITTED).tolist()
    suspects = contamination(known, scores)
    clean = [prompt for prompt in known if prompt.key not in suspects.outliers]
    fit = [prompt for prompt in clean if prompt.split == "fit"]
    texts = [prompt.text for prompt in fit]
    vectors = Sentences(chosen.encoder) if chosen.encoder else Tfidf.of(texts)
    classifier = fit_classifier(vectors, texts, [prompt.forget for prompt in fit], chosen.regularisation)
    held = [prompt for prompt in clean if prompt.split == "calibration" and not prompt.forget]
    values = classifier.scores([prompt.text for prompt in held])
    found = calibrate(
        _grouped((prompt.key[0], value) for prompt, value in zip(held, values, strict=True)),
        Conformal(chosen.alpha),
        by_length=_grouped((prompt.length, value) for prompt, value in zip(held, values, strict=True)),
    )
    test = [prompt for prompt in prompts if prompt.split == "test"]
    tested = classifier.scores([prompt.text for prompt in test])
    by_corpus = _grouped((prompt.key[0], value) for prompt, value in zip(test, tested, strict=True))
    rates = {name: rate_above(its, found.threshold).as_dict() for name, its in by_corpus.items()}
    proof = [Read(value, one.text, one.forget) for one, value in zip(test, tested, strict=True)]
    return PromptGate(
        name="prompt", classifier=classifier, threshold=found.threshold,
        action="corrupt" if isinstance(chosen, settings.PromptCorrupt) else "refuse",
        strength=chosen.strength if isinstance(chosen, settings.PromptCorrupt) else 0.0, seed=seed,
        evidence={
            "alpha": chosen.alpha, "caught": rates.pop(FORGET), "false_positives": rates,
            "contamination": suspects.as_dict(), "proof": two_of(proof, found.threshold),
        },
    )  # fmt: skip


def _check(prompts: Sequence[Prompt], corpora: Mapping[str, str]) -> None:
    """Raises a `CorpusError` for a text on both sides, or a corpus without a window in a split."""
    summaries = {name: Corpus.of(name, "retain", file).summary() for name, file in corpora.items()}
    check_disjoint(summaries.pop(FORGET), summaries)
    splits: tuple[Split, ...] = ("fit", "calibration", "test")
    for name in corpora:
        for split in splits:
            if not any(prompt.key[0] == name and prompt.split == split for prompt in prompts):
                raise TooFewSequencesError(
                    f"the corpus {name!r} has no window in its {split} split: give it at least ten documents"
                )


def _grouped(pairs: Iterable[tuple[Any, float]]) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups

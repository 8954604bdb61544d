"""The offline pass of a fit: from named texts to shards. Nothing is decided here.

texts -> corpora -> disjoint splits -> does the SAE fit? -> shards
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from saeguard.config import FitConfig
from saeguard.corpus import Corpus, CorpusSummary, check_disjoint
from saeguard.doctor.diagnosis import admit
from saeguard.doctor.reading import Subject
from saeguard.errors import CorpusError
from saeguard.model import model_fingerprint
from saeguard.progress import progress
from saeguard.sample import FORGET
from saeguard.shards import Pass, Shard, estimated_tokens, pass_fingerprint, run_pass
from saeguard.statistics import FeatureStatistics
from saeguard.windows import Windower

Texts = str | Path | Sequence[str]


@dataclass(frozen=True)
class Material:
    """What the offline pass leaves to decide on: its shards and the summaries of the texts, by corpus.

    `doctor` is what the guardrail records of how the SAE fits.
    """

    task: Pass
    shards: Mapping[str, list[Shard]]
    summaries: Mapping[str, CorpusSummary]
    doctor: Mapping[str, Any]

    @property
    def every_shard(self) -> list[Shard]:
        """The shards of all corpora."""
        return [shard for its in self.shards.values() for shard in its]

    def statistics(self) -> dict[str, FeatureStatistics]:
        """The statistics of every feature, by corpus."""
        return {
            name: reduce(FeatureStatistics.merge, (shard.statistics() for shard in its))
            for name, its in self.shards.items()
        }


@contextmanager
def gather(
    subject: Subject, forget: Texts | None, retain: Mapping[str, Texts], config: FitConfig,
    work_dir: str | Path | None, *, show_progress: bool,
) -> Iterator[Material]:  # fmt: skip
    """The offline pass, as `fit` describes it. Without `work_dir` its shards are there inside the `with` block only."""
    corpora = _corpora(forget, retain, config)
    summaries = {name: corpus.summary() for name, corpus in corpora.items()}
    if FORGET in summaries:
        check_disjoint(summaries[FORGET], {name: s for name, s in summaries.items() if name != FORGET})
    kept = [corpus for corpus in corpora.values() if corpus.role == "retain"]
    doctor = admit(subject, kept, force=config.force)
    chat = subject.tokenizer.chat_template is not None if config.chat is None else config.chat
    windower = Windower(subject.tokenizer, config.lengths, chat)
    task = Pass(subject.model, subject.tokenizer, subject.sae, subject.layer, windower, config.sample)
    identity = pass_fingerprint(task, model_fingerprint(subject.model), summaries)
    with ExitStack() as stack:
        folder = _shard_folder(work_dir, identity, stack)
        with progress("reading", estimated_tokens(summaries.values()), unit="tokens", show=show_progress) as advance:
            shards = run_pass(task, corpora, summaries, folder, advance)
        yield Material(task, shards, summaries, doctor)


def _corpora(forget: Texts | None, retain: Mapping[str, Texts], config: FitConfig) -> dict[str, Corpus]:
    if not retain:
        raise CorpusError("no retain corpus: expected at least one named set of texts that must stay untouched")
    if FORGET in retain:
        raise CorpusError(f"a retain corpus cannot be named {FORGET!r}: choose another name")
    if unknown := sorted(set(config.near_retain or ()) - retain.keys()):
        raise CorpusError(f"near_retain names no retain corpus: {unknown}. Expected some of {[*retain]}")
    if forget is None and config.given is None:
        raise CorpusError(
            "no forget text and no features: expected text to be forgotten, or features that stand for it"
        )
    named = {} if forget is None else {FORGET: Corpus.of(FORGET, "forget", forget)}
    return named | {name: Corpus.of(name, "retain", texts) for name, texts in retain.items()}


def _shard_folder(work_dir: str | Path | None, identity: str, stack: ExitStack) -> Path:
    """Where the shards of one pass lie: in `work_dir`, or until the stack closes. Raises `CorpusError`."""
    try:
        work = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="saeguard-")))
        (work / identity).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"cannot write to the work folder {work_dir or 'for temporary files'}: {error}") from error
    return work / identity

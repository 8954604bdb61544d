"""A job: one sequence to be written for one request, what is told of it as it goes, and what it has come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saeguard.serving.readings import AtPrompt, Reading, TokenReading
from saeguard.serving.sampling import Sampling, Token
from saeguard.serving.text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Started:
    """The prompt was read; `readings` are of the prompt."""

    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Traced:
    """Tokens of the sequence that were read since this was told last, each with what every rule read there."""

    tokens: tuple[tuple[int, tuple[TokenReading, ...]], ...]


@dataclass(frozen=True)
class Written:
    """A token was drawn; `text` is what may be shown now, which lags behind where a character or a stop string may
    not be complete."""

    text: str
    token: Token


@dataclass(frozen=True)
class Finished:
    """The end. `text` is what was held back; `readings` are of the prompt and of every token but the last."""

    reason: FinishReason
    text: str
    readings: tuple[Reading, ...]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end, without an answer. `late` where its time was up, else the engine failed."""

    message: str
    late: bool = False


Event = Started | Traced | Written | Finished | Failed


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be written: prompt ids, sampling, ids of the guardrails that act on it (None: all), the moment
    (`time.monotonic`) at which its time is up, and who is told. With `trace`, what was read in each token is told too.
    `tell` is called on the engine's thread."""

    ids: Sequence[int]
    sampling: Sampling
    tell: Callable[[Event], None]
    guardrails: frozenset[str] | None = None
    deadline: float = float("inf")
    trace: bool = False


class Row:
    """A job at work: its generator, the tokens drawn so far, and their text."""

    def __init__(self, job: Job, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job = job
        self.generator = job.sampling.generator()
        self.counts: Counter[int] = Counter()
        self.drawn = 0
        self.last = 0
        self.at_prompt: AtPrompt = ()
        self._ends = ends
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(job.sampling.stop)

    def push(self, token: Token) -> FinishReason | None:
        """Take a drawn token, tell its text, and say whether it was the last and why."""
        self.drawn += 1
        self.last = token.id
        if token.id in self._ends:
            return "stop"
        self.counts[token.id] += 1
        self.job.tell(Written(self._stops.push(self._text.push(token.id)), token))
        if self._stops.stopped:
            return "stop"
        return "length" if self.drawn >= self.job.sampling.max_tokens else None

    def finish(self, reason: FinishReason, readings: tuple[Reading, ...]) -> None:
        """Tell the end."""
        rest = "" if self._stops.stopped else self._stops.push(self._text.finish()) + self._stops.finish()
        self.job.tell(Finished(reason, rest, readings, self.drawn))

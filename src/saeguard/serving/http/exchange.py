"""One request's jobs, between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from saeguard.errors import OverloadedError, UnavailableError
from saeguard.serving.engine import Engine
from saeguard.serving.http.errors import late, overloaded, unavailable
from saeguard.serving.job import Event, Failed, Finished, FinishReason, Job, Traced, Written
from saeguard.serving.readings import Reading, TokenReading
from saeguard.serving.sampling import Sampling, Token

SEEDS = 2**63


@dataclass(frozen=True)
class Ask:
    """What is to be written: `n` answers to each prompt, under the guardrails chosen (None: all), in `seconds`, and
    whether it is traced."""

    prompts: Sequence[Sequence[int]]
    n: int
    sampling: Sampling
    guardrails: frozenset[str] | None
    seconds: float
    trace: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))


@dataclass
class Answer:
    """What has come of one job."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: FinishReason | None = None
    readings: tuple[Reading, ...] = ()
    drawn: int = 0
    trace: list[tuple[int, tuple[TokenReading, ...]]] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Add what the engine told."""
        if isinstance(event, Written):
            self.text += event.text
            self.tokens.append(event.token)
        elif isinstance(event, Traced):
            self.trace += event.tokens
        elif isinstance(event, Finished):
            self.text += event.text
            self.reason, self.readings, self.drawn = event.reason, event.readings, event.tokens


class Exchange:
    """The jobs of one request, at work from `begin` until all have ended or `cancel`."""

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self.first_token: float | None = None
        """Moment (`time.monotonic`) of the first token."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        deadline = time.monotonic() + ask.seconds
        pairs = [(prompt, i) for prompt in ask.prompts for i in range(ask.n)]
        self.answers = [Answer() for _ in pairs]
        self._jobs = [
            Job(prompt, _seeded(ask.sampling, i), self._teller(place), ask.guardrails, deadline, ask.trace)
            for place, (prompt, i) in enumerate(pairs)
        ]

    def begin(self) -> None:
        """Hand the jobs to the engine. Raises an `ApiError` where it does not take them."""
        try:
            self._engine.submit(self._jobs)
        except OverloadedError as error:
            raise overloaded(str(error)) from error
        except UnavailableError as error:
            raise unavailable(str(error)) from error

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What the engine tells, with the place of the answer it is of, until all have ended. Raises an `ApiError`."""
        open_ = len(self._jobs)
        while open_:
            place, event = await self._queue.get()
            if isinstance(event, Failed):
                raise late(event.message) if event.late else unavailable(event.message)
            self.answers[place].take(event)
            if isinstance(event, Written) and self.first_token is None:
                self.first_token = time.monotonic()
            open_ -= isinstance(event, Finished)
            yield place, event

    async def gather(self) -> list[Answer]:
        """All answers, when all have ended."""
        async for _ in self.events():
            pass
        return self.answers

    def cancel(self) -> None:
        """Stop what is not finished."""
        for job, answer in zip(self._jobs, self.answers, strict=True):
            if answer.reason is None:
                self._engine.cancel(job)

    def _teller(self, place: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (place, event))

        return tell


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """Each of several answers to a prompt draws from a seed of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + choice) % SEEDS)

"""The engine: a thread that writes many sequences at once, each joining and leaving as it comes and ends.

One step: drop what was cancelled or is late; read some waiting prompts, like lengths together; write one token for
every running row. A prompt is always read whole and under its own guards: no prefix is shared between requests, so
nothing that one guardrail let pass can serve another request.

What it does not know is HTTP. What goes wrong inside it ends the jobs concerned, and a fault that leaves the model in
an unknown state ends all of them and the engine, which then refuses work.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import GuardrailError, NonFiniteError, OverloadedError, UnavailableError
from saeguard.serving.batch import Batch
from saeguard.serving.job import Failed, FinishReason, Job, Row, Started, Traced
from saeguard.serving.readings import Guards
from saeguard.serving.sampling import Token, draw, with_logprobs

LATE = "the request took longer than this server allows"
BROKEN = "the engine failed; this server takes no more requests"
STOPPED = "the server is shutting down"


@dataclass(frozen=True)
class Limits:
    """Rows written at once, jobs that may wait, and prompt tokens (padding included) read in one pass."""

    rows: int = 32
    waiting: int = 256
    prompt_tokens: int = 2048


class Engine:
    """Writes jobs on a thread of its own, from `start` to `stop`. `ends` are the tokens that end an answer, by
    default the model's own."""

    def __init__(
        self, model: Any, tokenizer: Any, guards: Guards, limits: Limits, *, ends: frozenset[int] | None = None
    ) -> None:
        self.fault: str | None = None
        self._model, self._tokenizer, self._guards, self._limits = model, tokenizer, guards, limits
        self._ends = end_tokens(model, tokenizer) if ends is None else ends
        self._pad = tokenizer.pad_token_id or 0
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._cancelled: set[Job] = set()
        self._batch: Batch | None = None
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="saeguard-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs not yet begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows being written."""
        batch = self._batch
        return 0 if batch is None else len(batch.rows)

    @property
    def ready(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and self.fault is None and not self._stopping

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these jobs. Raises `OverloadedError` where not all can wait, `UnavailableError` at the end."""
        with self._change:
            if not self.ready:
                raise UnavailableError(BROKEN if self.fault else STOPPED)
            if len(self._waiting) + len(jobs) > self._limits.waiting:
                raise OverloadedError.mismatch(
                    "requests waiting", found=len(self._waiting), expected=f"at most {self._limits.waiting}",
                    fix="Try again in a moment.",
                )  # fmt: skip
            self._waiting.extend(jobs)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Stop writing a job; nothing more is told of it. One that has ended is left alone."""
        with self._change:
            self._cancelled.add(job)
            self._change.notify()

    def drain(self) -> None:
        """Take no more jobs; finish those there are, then end."""
        with self._change:
            self._stopping = True
            self._change.notify()

    def stop(self, grace: float) -> None:
        """Drain; after `grace` seconds those unfinished fail. Returns when the thread has ended."""
        self.drain()
        self._thread.join(grace)
        if self._thread.is_alive():
            self.fault = STOPPED
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._work_to_do():
                    self._step()
        except (GuardrailError, RuntimeError) as error:
            self.fault = f"{type(error).__name__}: {error}"
        finally:
            self._abandon()

    def _work_to_do(self) -> bool:
        """Wait for work; False at the end."""
        with self._change:
            while not (self._waiting or self._batch or self._stopping):
                self._cancelled.clear()
                self._change.wait()
            return self.fault is None and bool(self._waiting or self._batch or not self._stopping)

    def _abandon(self) -> None:
        with self._change:
            if not self._stopping and self.fault is None:
                self.fault = "the engine's thread ended"
            written = self._batch.rows if self._batch else []
            jobs = [*self._waiting, *self._reading, *(row.job for row in written)]
            self._waiting.clear()
            self._batch = None
        for job in jobs:
            job.tell(Failed(STOPPED if self._stopping else BROKEN))

    def _step(self) -> None:
        self._drop()
        if new := self._admit():
            rows = [Row(job, self._tokenizer, self._ends) for job in new]
            self._join(self._advance(Batch(self._model, self._guards, rows, pad=self._pad), fresh=True))
            self._reading = []
        if self._batch is not None:
            self._batch = self._advance(self._batch)

    def _drop(self) -> None:
        """Take out the jobs that were cancelled, and those whose time is up."""
        now = time.monotonic()
        with self._change:
            gone, self._cancelled = self._cancelled, set()
            late = [job for job in self._waiting if job.deadline < now and job not in gone]
            self._waiting = deque(job for job in self._waiting if job.deadline >= now and job not in gone)
        if self._batch is not None:
            rows = [(place, row.job) for place, row in enumerate(self._batch.rows) if row.job not in gone]
            late += [job for _, job in rows if job.deadline < now]
            self._batch = _kept(self._batch, [place for place, job in rows if job.deadline >= now])
        for job in late:
            job.tell(Failed(LATE, late=True))

    def _admit(self) -> list[Job]:
        """The jobs to read next: the one that has waited longest, and others that fit into one pass with it."""
        with self._change:
            room = self._limits.rows - self.running
            group: list[Job] = []
            for job in list(self._waiting)[:room]:
                lengths = [len(one.ids) for one in [*group, job]]
                if group and (
                    max(lengths) * len(lengths) > self._limits.prompt_tokens or 2 * min(lengths) < max(lengths)
                ):
                    continue
                group.append(job)
            for job in group:
                self._waiting.remove(job)
            self._reading = group
            return group

    def _join(self, fresh: Batch | None) -> None:
        if fresh is not None and self._batch is not None:
            self._batch.join(fresh)
        elif fresh is not None:
            self._batch = fresh

    def _advance(self, batch: Batch, *, fresh: bool = False) -> Batch | None:
        """One pass, one token a row; the rows that go on."""
        try:
            logits = batch.forward()
        except NonFiniteError as error:
            for row in batch.rows:
                row.job.tell(Failed(str(error)))
            return None
        ends = self._ends_of(batch, logits, fresh)
        for place, reason in enumerate(ends):
            if reason is not None:
                batch.finish(place, reason)
        kept = _kept(batch, [place for place, reason in enumerate(ends) if reason is None])
        if kept is not None:
            kept.extend()
        return kept

    def _ends_of(self, batch: Batch, logits: Tensor, fresh: bool) -> list[FinishReason | None]:
        """Draw a token for each row that no guardrail refuses; the reason why each row ends, None if it goes on."""
        likeliest = logits.argmax(dim=1).tolist()
        ends: list[FinishReason | None] = []
        for place, (row, refused) in enumerate(zip(batch.rows, batch.refused(), strict=True)):
            if fresh:
                row.job.tell(Started(batch.readings(place)))
            if row.job.trace:
                row.job.tell(Traced(batch.trace(place)))
            ends.append("refused" if refused else row.push(_token(row, logits[place], likeliest[place])))
        return ends


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: of the model's generation config and of the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _token(row: Row, logits: Tensor, likeliest: int) -> Token:
    sampling = row.job.sampling
    drawn = likeliest if sampling.greedy else draw(logits, sampling, row.generator, row.counts)
    return Token(drawn) if sampling.logprobs is None else with_logprobs(drawn, logits, sampling.logprobs)


def _kept(batch: Batch, places: list[int]) -> Batch | None:
    if not places:
        return None
    batch.keep(places)
    return batch

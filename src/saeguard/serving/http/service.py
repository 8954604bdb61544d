"""What the routes of one server share, and the record of one call."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from starlette.requests import Request

from saeguard.errors import UsageError
from saeguard.serving.config import ServeConfig
from saeguard.serving.engine import Engine
from saeguard.serving.http.errors import ApiError
from saeguard.serving.http.exchange import Ask, Exchange
from saeguard.serving.http.logs import Log
from saeguard.serving.http.metrics import Metrics
from saeguard.serving.http.prompts import Prompter
from saeguard.serving.policy import Served

CLIENT_GONE = 499
"""Status in log and metrics of a request whose client did not wait for the answer."""


@dataclass(frozen=True)
class Service:
    """One model being served, with what guards it. `context` is the most tokens of prompt and answer together."""

    config: ServeConfig
    name: str
    context: int
    tokenizer: Any
    guardrails: Mapping[str, Served]
    engine: Engine
    prompter: Prompter
    metrics: Metrics
    log: Log
    keys: tuple[bytes, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def authorise(self, request: Request) -> None:
        """Raises `ApiError` unless the request carries one of the keys. Each is compared, in constant time."""
        if not self.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "You didn't provide an API key: Authorization: Bearer KEY", code="missing_api_key")
        offered = given.strip().encode("utf-8", "replace")
        if not any([hmac.compare_digest(offered, key) for key in self.keys]):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")


def read_keys(path: str | None, more: str = "") -> tuple[bytes, ...]:
    """API keys: the lines of a file, less those that begin with #, and the words of `more`. Raises `UsageError`."""
    if path is None:
        return tuple(word.encode() for word in more.split())
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-keys-file {path}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")] + more.split()
    if not keys:
        raise UsageError(f"--api-keys-file {path}: no key in it. Without the option, anyone may ask.")
    return tuple(key.encode() for key in keys)


class Call:
    """One HTTP request: its id, and what is measured and logged of it, once, at its end."""

    def __init__(self, service: Service, route: str) -> None:
        self.id = uuid4().hex
        self.ask: Ask | None = None
        self.exchange: Exchange | None = None
        self.prompt: Any = None
        self._service, self._route = service, route
        self._started = time.monotonic()
        self._ended = False

    def end(self, status: int, code: str | None = None) -> None:
        """Count and log; what is not finished is given up."""
        if self._ended:
            return
        self._ended = True
        if self.exchange is not None:
            self.exchange.cancel()
        seconds = time.monotonic() - self._started
        answers = self.exchange.answers if self.exchange is not None else []
        first = self.exchange.first_token if self.exchange is not None else None
        metrics = self._service.metrics
        metrics.request(self._route, status, seconds, None if first is None else first - self._started)
        for answer in answers:
            metrics.sequence(answer.readings)
        if status == CLIENT_GONE:
            metrics.disconnect()
        read, written = (
            (self.ask.prompt_tokens if self.ask else 0),
            sum(max(answer.drawn, len(answer.tokens)) for answer in answers),
        )
        metrics.tokens(read, written)
        triggered = sorted({r.id for answer in answers for r in answer.readings if r.verdict.triggered})
        texts = {"prompt": self.prompt, "answers": [answer.text for answer in answers]}
        self._service.log.write(
            "request", id=self.id, route=self._route, status=status, code=code, seconds=round(seconds, 3),
            prompt_tokens=read, completion_tokens=written, triggered=triggered,
            **(texts if self._service.config.log_prompts else {}),
        )  # fmt: skip

"""From a model and guardrails to a running server, and its end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from saeguard.errors import EngineError
from saeguard.model import text_config
from saeguard.serving.config import ServeConfig
from saeguard.serving.engine import Engine, Limits
from saeguard.serving.http.app import build_app
from saeguard.serving.http.logs import Log
from saeguard.serving.http.metrics import Metrics
from saeguard.serving.http.prompts import Prompter
from saeguard.serving.http.service import Service
from saeguard.serving.policy import Served, check_playground
from saeguard.serving.proof import prove
from saeguard.serving.readings import attached


@dataclass(frozen=True)
class Ready:
    """A server that answers: where, as what, how many seconds after its start (loading the model not counted)."""

    url: str
    model: str
    guardrails: tuple[str, ...]
    seconds: float


@contextmanager
def service(
    model: Any, tokenizer: Any, guardrails: Mapping[str, Served], config: ServeConfig, *,
    keys: tuple[bytes, ...] = (), log: Log | None = None,
) -> Iterator[Service]:  # fmt: skip
    """Guard the model, prove it, and keep an engine at work inside the block. Raises a `GuardrailError` instead."""
    check_playground(config, keys)
    with attached(list(guardrails.items()), model, tokenizer, normalise=config.normalise) as guards:
        engine = Engine(model, tokenizer, guards, Limits(config.max_batch, config.max_waiting))
        prompter = Prompter(tokenizer, text_config(model).vocab_size)
        engine.start()
        try:
            prove(engine, guardrails, tokenizer)
            yield Service(
                config, config.served_name or str(model.config._name_or_path) or "model", context_length(model, config),
                tokenizer, guardrails, engine, prompter, Metrics(engine), log or Log(), keys,
            )  # fmt: skip
        finally:
            prompter.close()
            engine.stop(grace=0)


class Server(uvicorn.Server):
    """Answers from `run` until SIGTERM, Ctrl-C or `stop`, then refuses new requests and finishes those that run.

    `ready` is called when the port is open. Raises `EngineError` for an address that cannot be listened on.
    """

    def __init__(self, running: Service, ready: Callable[[Ready], None], started: float) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(running), lifespan="off", log_config=None, access_log=False, server_header=False,
                timeout_graceful_shutdown=max(1, round(running.config.grace_seconds)),
            )
        )  # fmt: skip
        self._running, self._ready, self._started = running, ready, started
        self._listener = _listen(running.config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self._listener])
        self._running.log.write("stopped")

    def stop(self) -> None:
        """From any thread: take no more requests, finish those that run, return from `run`."""
        self._running.engine.drain()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        seconds = time.perf_counter() - self._started
        self._ready(Ready(url, self._running.name, tuple(self._running.guardrails), seconds))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._running.engine.drain()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, so that a server told to stop would seem to be killed.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def context_length(model: Any, config: ServeConfig) -> int:
    """Tokens of prompt and answer together: what the operator says, at most what the model was made for."""
    made_for = getattr(text_config(model), "max_position_embeddings", None) or config.max_context
    if made_for is None:
        raise EngineError("this model does not say how long a text may be: give --max-context")
    return min(made_for, config.max_context or made_for)


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise EngineError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    return listener

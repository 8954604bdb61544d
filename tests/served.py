"""What the tests of the server share: guardrails that pass the start-up proof, and a server on a real port."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from conftest import SENTENCES
from saeguard.guardrail import Guardrail
from saeguard.serving.config import ServeConfig
from saeguard.serving.http.logs import Log
from saeguard.serving.http.server import Ready, Server, service
from saeguard.serving.http.service import Service
from saeguard.windows import bos_ids
from tiny import with_rule

NAME = "tiny"


def proven(guardrail: Guardrail, model: Any, tokenizer: Any, **changes: Any) -> Guardrail:
    """With a threshold between the sentences that read highest and lowest, which are its proof."""
    with guardrail.attach(model, tokenizer) as guard:
        rows = [bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False).input_ids for text in SENTENCES]
        values = [guard.judge(torch.tensor([row]))[0].statistic for row in rows]
    order = sorted(zip(values, SENTENCES, strict=True))
    (low, silent), (high, fires) = order[0], order[-1]
    evidence = {"proof": {"fires": fires, "silent": silent}}
    return with_rule(guardrail, threshold=(low + high) / 2, evidence=evidence, **changes)


@dataclass
class Served:
    """A running server: where, its parts, and what it has logged."""

    url: str
    service: Service
    server: Server
    log: io.StringIO

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def idle(self) -> None:
        """Wait until nothing is written or waits."""
        end = time.monotonic() + 30
        while self.service.engine.running or self.service.engine.waiting:
            assert time.monotonic() < end, "the engine does not come to rest"
            time.sleep(0.005)


@contextmanager
def served(
    model: Any, tokenizer: Any, guardrails: Mapping[str, Guardrail], *, keys: tuple[bytes, ...] = (), **options: Any
) -> Iterator[Served]:
    """A server on a free port, until the block ends."""
    config = replace(ServeConfig(port=0, served_name=NAME, max_tokens=200), **options)
    log, opened = io.StringIO(), threading.Event()
    found: list[Ready] = []

    def ready(it: Ready) -> None:
        found.append(it)
        opened.set()

    with service(model, tokenizer, guardrails, config, keys=keys, log=Log(log)) as running:
        server = Server(running, ready, time.perf_counter())
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert opened.wait(30)
        try:
            yield Served(found[0].url, running, server, log)
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive()

"""What a monitoring system reads at `/metrics`: guardrails, requests, latency and queue."""

from __future__ import annotations

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from saeguard.serving.engine import Engine
from saeguard.serving.readings import Reading

RELATIVE = (-1.0, -0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
DENSITIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
RULE = ("guardrail", "rule", "action")


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = its = CollectorRegistry()
        ProcessCollector(registry=its)
        self._sequences = Counter("saeguard_sequences", "Sequences read to their end", RULE, registry=its)
        self._triggered = Counter("saeguard_triggered", "Sequences that triggered", RULE, registry=its)
        self._clamped = Counter("saeguard_tokens_clamped", "Tokens whose features were clamped", RULE, registry=its)
        self._statistic = Histogram(
            "saeguard_statistic_relative", "(statistic - threshold) / |threshold|; above 0 is triggered", RULE,
            buckets=RELATIVE, registry=its,
        )  # fmt: skip
        self._density = Histogram(
            "saeguard_hot_density", "Share of a sequence's tokens with an active selected feature", RULE,
            buckets=DENSITIES, registry=its,
        )  # fmt: skip
        self._requests = Counter("saeguard_requests", "Requests answered", ("route", "status"), registry=its)
        self._first = Histogram(
            "saeguard_first_token_seconds", "From the request to the first token", buckets=SECONDS, registry=its
        )
        self._whole = Histogram(
            "saeguard_request_seconds", "From the request to its end", ("route",), buckets=SECONDS, registry=its
        )
        self._tokens = Counter("saeguard_tokens", "Tokens read and written", ("direction",), registry=its)
        self._lost = Counter("saeguard_disconnects", "Clients that went before their answer was whole", registry=its)
        gauges = {
            "saeguard_waiting": ("Sequences that wait for their turn", lambda: engine.waiting),
            "saeguard_running": ("Sequences being written", lambda: engine.running),
            "saeguard_ready": ("1 while requests are taken", lambda: int(engine.ready)),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=its).set_function(value)

    def sequence(self, readings: Iterable[Reading]) -> None:
        """A sequence was read to its end."""
        for reading in readings:
            labels = (reading.id, reading.verdict.rule, reading.action)
            self._sequences.labels(*labels).inc()
            self._triggered.labels(*labels).inc(reading.verdict.triggered)
            self._clamped.labels(*labels).inc(reading.clamped)
            if reading.hot is not None:
                self._density.labels(*labels).observe(reading.hot / max(1, reading.tokens))
            margin = reading.verdict.statistic - reading.verdict.threshold
            if math.isfinite(margin) and reading.verdict.threshold:
                self._statistic.labels(*labels).observe(margin / abs(reading.verdict.threshold))

    def request(self, route: str, status: int, seconds: float, first: float | None) -> None:
        """A request was answered, or refused."""
        self._requests.labels(route, str(status)).inc()
        self._whole.labels(route).observe(seconds)
        if first is not None:
            self._first.observe(first)

    def tokens(self, read: int, written: int) -> None:
        """So many tokens of prompts and of answers."""
        self._tokens.labels("read").inc(read)
        self._tokens.labels("written").inc(written)

    def disconnect(self) -> None:
        """A client went."""
        self._lost.inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

"""Every choice of `saeguard serve`, with its default and its help text. The command line is generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.choices import REFUSAL
from saeguard.options import option


@dataclass(frozen=True)
class ServeConfig:
    """How a guarded model is served."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_name: str | None = option(None, "the model's name in requests; default: its own")
    refusal: str = option(REFUSAL, "what takes the place of an answer under the action refuse")
    refusal_reason: Literal["content_filter", "stop"] = option("content_filter", "finish_reason of a refusal")
    verdicts: bool = option(True, "tell verdicts in answers, as field and headers")
    normalise: bool = option(
        False, "let guardrails read prompts also with odd spelling undone; the model reads them as they are"
    )
    allow_guardrail_choice: bool = option(False, "let a request name the guardrails that act on it, or none")
    api_keys_file: str | None = option(None, "file with one key a line; without keys anyone may ask")
    playground: bool = option(
        False, "let requests, and the page at /, see each token as the gates do, and choose guardrails or none"
    )
    cors_origins: tuple[str, ...] = option((), "web origins that may call this server from a browser")
    max_batch: int = option(32, "sequences written at once")
    max_waiting: int = option(256, "sequences that may wait for their turn; more are refused")
    max_context: int | None = option(None, "tokens of prompt and answer together; default: what the model was made for")
    max_tokens: int = option(1024, "tokens of an answer, at most and where a request does not say")
    max_choices: int = option(16, "answers to one request: n times the number of prompts")
    max_body: int = option(1_000_000, "bytes of a request")
    body_seconds: float = option(10.0, "time in which a request must have come in whole")
    request_seconds: float = option(300.0, "time a request may take, waiting included")
    grace_seconds: float = option(30.0, "time that running requests have to finish when the server is stopped")
    log_prompts: bool = option(False, "write prompts and answers into the log")

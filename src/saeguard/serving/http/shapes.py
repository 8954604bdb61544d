"""The two shapes of an answer: a chat completion and a text completion, whole or in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from saeguard.serving.http.exchange import Answer
from saeguard.serving.readings import Reading
from saeguard.serving.sampling import Token

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON has no word for."""


class Shape(Protocol):
    """How the choices of an answer look."""

    prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    def choice(self, index: int, answer: Answer, text: str, reason: str) -> dict[str, Any]:
        """A whole choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first text of a streamed choice."""

    def delta(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Some text of a streamed choice."""

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The end of a streamed choice."""


@dataclass(frozen=True)
class ChatShape:
    """`/v1/chat/completions`. Log-probabilities are told if the request asked for them."""

    tokenizer: Any
    prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, answer: Answer, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._of(answer.tokens), "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._delta(index, {"content": text}, self._of(tokens), None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, None, reason)

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        known = [token for token in tokens if token.logprob is not None]
        if not known:
            return None
        rows = [
            self._row(token.id, token.logprob) | {"top_logprobs": [self._row(*pair) for pair in token.top]}
            for token in known
        ]
        return {"content": rows, "refusal": None}

    def _row(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


@dataclass(frozen=True)
class TextShape:
    """`/v1/completions`."""

    tokenizer: Any
    prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, index: int, answer: Answer, text: str, reason: str) -> dict[str, Any]:
        return self._choice(index, text, answer.tokens, reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._choice(index, text, tokens, None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        return self._choice(index, "", (), reason)

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._of(tokens), "finish_reason": reason}

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        known = [token for token in tokens if token.logprob is not None]
        if not known:
            return None
        texts = [self.tokenizer.decode([token.id]) for token in known]
        ends = [sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [{self.tokenizer.decode([i]): _finite(p) for i, p in token.top} for token in known]
        return {
            "tokens": texts, "token_logprobs": [_finite(token.logprob) for token in known],
            "top_logprobs": top, "text_offset": ends,
        }  # fmt: skip


def verdict_rows(index: int, readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """The extension field: what each rule decided on the answer `index`."""
    return [
        {
            "index": index,
            "id": reading.id,
            "rule": reading.verdict.rule,
            "action": reading.action,
            "statistic": reading.verdict.statistic if math.isfinite(reading.verdict.statistic) else None,
            "threshold": reading.verdict.threshold,
            "triggered": reading.verdict.triggered,
            "first_token": reading.verdict.first_token,
        }
        for reading in readings
    ]


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)

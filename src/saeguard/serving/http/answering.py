"""From what the engine writes to an HTTP answer, whole or streamed, with refusals and verdicts in it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from saeguard.serving.http.errors import ApiError
from saeguard.serving.http.exchange import Answer, Ask, Exchange
from saeguard.serving.http.reading import ClientGone
from saeguard.serving.http.service import CLIENT_GONE, Call, Service
from saeguard.serving.http.shapes import Shape, verdict_rows
from saeguard.serving.http.tracing import Tracer
from saeguard.serving.job import Event, Finished, Started, Traced, Written
from saeguard.serving.readings import TokenReading

DONE = "data: [DONE]\n\n"
HEADER = 3000
"""Characters of a header; proxies refuse answers with long ones."""
Found = TypeVar("Found")


async def unless_gone(request: Request, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is given up when the client hangs up. Raises `ClientGone`."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Answering:
    """The answer to one request in the shape of its route."""

    def __init__(self, service: Service, call: Call, shape: Shape, ask: Ask, exchange: Exchange) -> None:
        self._service, self._call, self._shape = service, call, shape
        self._ask, self._exchange = ask, exchange
        self._tracers = [Tracer(service.tokenizer) for _ in exchange.answers]
        self._head = {"id": shape.prefix + call.id, "created": int(time.time()), "model": service.name}

    async def whole(self, request: Request) -> Response:
        """One JSON object, when all is written."""
        answers = await unless_gone(request, self._exchange.gather())
        choices = [
            self._shape.choice(index, answer, self._text(answer), self._reason(answer))
            for index, answer in enumerate(answers)
        ]
        body = self._head | {"object": self._shape.whole, "choices": choices, "usage": self._usage()}
        rows = [row for index, answer in enumerate(answers) for row in verdict_rows(index, answer.readings)]
        if self._service.config.verdicts:
            body["saeguard"] = rows
        if self._ask.trace:
            body["saeguard_trace"] = [self._traced(i, answer.trace) for i, answer in enumerate(answers)]
        self._call.end(200)
        return JSONResponse(body, headers=self._headers(rows))

    async def streamed(self, request: Request, *, usage: bool) -> Response:
        """Server-sent events, from the first token on. Its headers tell the verdict on the prompt."""
        events = self._exchange.events()
        first = await unless_gone(request, anext(events))
        rows = verdict_rows(first[0], first[1].readings) if isinstance(first[1], Started) else []
        return _Stream(self._lines(first, events, usage), self._call, self._headers(rows))

    async def _lines(
        self, first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]], usage: bool
    ) -> AsyncIterator[str]:
        for index in range(len(self._exchange.answers)):
            if (opening := self._shape.opening(index)) is not None:
                yield self._chunk([opening])
        try:
            yield "".join(self._of_event(*first))
            async for place, event in events:
                if lines := "".join(self._of_event(place, event)):
                    yield lines
        except ApiError as error:
            self._call.end(error.status, error.body["error"]["code"])
            yield _data(error.body)
            return
        if usage:
            yield self._chunk([], usage=self._usage())
        self._call.end(200)
        yield DONE

    def _of_event(self, index: int, event: Event) -> list[str]:
        answer, shape = self._exchange.answers[index], self._shape
        if isinstance(event, Written):
            told = event.text or event.token.logprob is not None
            return [self._chunk([shape.delta(index, event.text, [event.token])])] if told else []
        if isinstance(event, Traced):
            return [self._chunk([], saeguard_trace=[self._traced(index, event.tokens)])]
        if not isinstance(event, Finished):
            return []
        rest = event.text
        if event.reason == "refused":
            rest = ("\n\n" if answer.text else "") + self._service.config.refusal
        lines = [self._chunk([shape.delta(index, rest, ())])] if rest else []
        verdicts = {"saeguard": verdict_rows(index, event.readings)} if self._service.config.verdicts else {}
        return [*lines, self._chunk([shape.closing(index, self._reason(answer))], **verdicts)]

    def _traced(self, index: int, tokens: Sequence[tuple[int, tuple[TokenReading, ...]]]) -> dict[str, Any]:
        return {"index": index, "tokens": self._tracers[index].rows(tokens)}

    def _chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return _data(self._head | {"object": self._shape.chunk, "choices": choices} | more)

    def _text(self, answer: Answer) -> str:
        return self._service.config.refusal if answer.reason == "refused" else answer.text

    def _reason(self, answer: Answer) -> str:
        return self._service.config.refusal_reason if answer.reason == "refused" else str(answer.reason)

    def _usage(self) -> dict[str, int]:
        read, written = self._ask.prompt_tokens, sum(answer.drawn for answer in self._exchange.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _headers(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        if not self._service.config.verdicts:
            return {}
        triggered = sorted({row["id"] for row in rows if row["triggered"]})
        whole = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
        return {
            "X-Saeguard-Triggered": ",".join(triggered) or "none",
            **({"X-Saeguard-Verdict": whole} if len(whole) <= HEADER else {}),
        }


class _Stream(StreamingResponse):
    """Ends the call however the stream ends, also before its first line."""

    def __init__(self, lines: AsyncIterator[str], call: Call, headers: Mapping[str, str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store", **headers})
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end(CLIENT_GONE)


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"

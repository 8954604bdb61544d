"""From a request's bytes to what is to be written, refusing everything that is not right."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from saeguard.serving.http.errors import ApiError, invalid, late
from saeguard.serving.http.exchange import Ask
from saeguard.serving.http.schema import ChatRequest, CompletionRequest
from saeguard.serving.http.service import Service
from saeguard.serving.sampling import Sampling

Body = TypeVar("Body", bound=BaseModel)


class ClientGone(Exception):
    """The client hung up; nobody waits for an answer."""


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """The body, of at most `most` bytes, come in within `seconds`. Raises `ApiError`, or `ClientGone`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Any web page may have a browser send the other types here, without asking this server first.
        raise ApiError(415, "Send JSON, with Content-Type: application/json.", code="unsupported_media_type")
    declared = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"The request is larger than {most} bytes.", code="request_too_large")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise late(f"The request's body did not come in within {seconds:g} seconds.") from error
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)


def parse(kind: type[Body], body: bytes) -> Body:
    """The body as a request. Raises `ApiError`."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from error


async def understand(service: Service, wanted: ChatRequest | CompletionRequest) -> Ask:
    """What is to be written. Raises `ApiError` for a model or guardrail there is not, and past any limit."""
    check_model(service, wanted.model)
    guardrails = _guardrails(service, wanted)
    trace = wanted.saeguard is not None and wanted.saeguard.trace
    if trace:
        check_playground(service)
    if isinstance(wanted, ChatRequest):
        prompts = [await service.prompter.conversation(wanted.messages)]
    else:
        _check_choices(service, len(wanted.prompts))
        prompts = [await service.prompter.prompt(prompt) for prompt in wanted.prompts]
    n = wanted.n or 1
    _check_choices(service, n * len(prompts))
    sampling = Sampling(
        max_tokens=answer_tokens(service, max(map(len, prompts)), wanted.length),
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        presence_penalty=wanted.presence_penalty or 0.0,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        seed=wanted.seed,
        stop=wanted.stops,
        logprobs=wanted.alternatives,
    )
    return Ask(prompts, n, sampling, guardrails, service.config.request_seconds, trace)


def check_model(service: Service, name: str) -> None:
    """Raises `ApiError` for a model that is not served here."""
    if name != service.name:
        raise ApiError(
            404, f"The model `{name}` does not exist; this server has `{service.name}`.",
            param="model", code="model_not_found",
        )  # fmt: skip


def check_playground(service: Service) -> None:
    """Raises `ApiError` unless the operator lets requests see what the gates see."""
    if not service.config.playground:
        message = "saeguard.trace: this server does not show traces; it was started without --playground"
        raise ApiError(403, message, param="saeguard.trace", code="trace_not_allowed")


def _guardrails(service: Service, wanted: ChatRequest | CompletionRequest) -> frozenset[str] | None:
    if wanted.saeguard is None or wanted.saeguard.guardrails is None:
        return None
    if not (service.config.allow_guardrail_choice or service.config.playground):
        message = "saeguard.guardrails: this server does not let requests choose guardrails"
        raise ApiError(403, message, param="saeguard.guardrails", code="guardrail_choice_not_allowed")
    unknown = sorted(set(wanted.saeguard.guardrails) - service.guardrails.keys())
    if unknown:
        message = f"saeguard.guardrails: no guardrail {unknown[0]!r}; there are {', '.join(sorted(service.guardrails))}"
        raise ApiError(404, message, param="saeguard.guardrails", code="guardrail_not_found")
    return frozenset(wanted.saeguard.guardrails)


def _check_choices(service: Service, answers: int) -> None:
    most = service.config.max_choices
    if answers > most:
        message = f"n: {answers} answers asked for (n times the prompts), at most {most} are given"
        raise ApiError(400, message, param="n", code="invalid_value")


def answer_tokens(service: Service, prompt: int, asked: int | None) -> int:
    """How long answers may become. Raises `ApiError` past the context or the operator's limit."""
    most = service.config.max_tokens
    if asked is not None and asked > most:
        message = f"max_tokens: {asked} asked for, at most {most} are given"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    room = service.context - prompt
    if room < (asked or 1):
        message = f"This model's maximum context length is {service.context} tokens; your prompt has {prompt}" + (
            "" if asked is None else f" and the answer may have {asked}"
        )
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return asked or min(most, room)

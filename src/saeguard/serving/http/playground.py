"""To look with: the page, what the guardrails are, and the trace of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from saeguard.baselines.prompt_gate import PromptGate
from saeguard.rule import Rule
from saeguard.serving.http.answering import unless_gone
from saeguard.serving.http.exchange import Ask, Exchange
from saeguard.serving.http.reading import answer_tokens, check_playground, parse, read_body
from saeguard.serving.http.schema import TraceRequest
from saeguard.serving.http.service import Call, Service
from saeguard.serving.http.shapes import verdict_rows
from saeguard.serving.http.tracing import Tracer
from saeguard.serving.page import FILES, content
from saeguard.serving.policy import rules_of
from saeguard.serving.sampling import Sampling

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """Routes of the page's files. They say nothing of the model and need no key."""
    return [_file(path, content(name), kind) for path, (name, kind) in FILES.items()]


def _file(path: str, body: bytes, kind: str) -> Route:
    async def endpoint(_request: Request) -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return Route(path, endpoint)


def describe(service: Service) -> dict[str, Any]:
    """The guardrails, if this server tells verdicts; what their features mean, only in the playground."""
    config = service.config
    rules = [(name, rule) for name, its in service.guardrails.items() for rule in rules_of(its)]
    rows = [
        {"id": name, "rule": rule.name, "action": rule.action, "threshold": rule.threshold}
        | ({"features": _features(rule)} if config.playground else {})
        for name, rule in rules
        if config.verdicts or config.playground
    ]
    return {
        "object": "list", "data": rows, "guarded": bool(service.guardrails),
        "model": service.name, "playground": config.playground, "max_tokens": config.max_tokens,
    }  # fmt: skip


def _features(rule: Rule | PromptGate) -> list[dict[str, Any]]:
    if isinstance(rule, PromptGate):
        return []
    passages = rule.evidence.get("passages", {})
    return [
        {
            "id": feature.id,
            "explanation": getattr(feature, "explanation", None),
            "tokens": _tokens(passages.get(str(feature.id), ())),
        }
        for feature in rule.selected
    ]


def _tokens(passages: Sequence[dict[str, Any]]) -> list[str]:
    """The tokens on which a feature was strongest when it was fitted, each once."""
    return list(dict.fromkeys(passage["token"].strip() for passage in passages))


async def trace(service: Service, request: Request, call: Call) -> Response:
    """Read a text under all guardrails, and tell each token as their gates saw it. Raises `ApiError`."""
    check_playground(service)
    config = service.config
    wanted = parse(TraceRequest, await read_body(request, most=config.max_body, seconds=config.body_seconds))
    call.prompt = wanted.model_dump() if config.log_prompts else None
    if wanted.messages is not None:
        ids = await service.prompter.conversation(wanted.messages)
    else:
        ids = await service.prompter.prompt(wanted.text or "")
    sampling = Sampling(max_tokens=answer_tokens(service, len(ids), 1))
    call.ask = Ask([ids], 1, sampling, None, config.request_seconds, trace=True)
    call.exchange = Exchange(service.engine, call.ask)
    call.exchange.begin()
    (answer,) = await unless_gone(request, call.exchange.gather())
    call.end(200)
    rows = Tracer(service.tokenizer).rows(answer.trace)
    return JSONResponse({"object": "trace", "tokens": rows, "saeguard": verdict_rows(0, answer.readings)})

"""The routes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from saeguard.serving.http.answering import Answering, unless_gone
from saeguard.serving.http.errors import ApiError
from saeguard.serving.http.exchange import Exchange
from saeguard.serving.http.openapi import description
from saeguard.serving.http.playground import describe, page_routes, trace
from saeguard.serving.http.reading import ClientGone, check_model, parse, read_body, understand
from saeguard.serving.http.schema import ChatRequest, CompletionRequest
from saeguard.serving.http.service import CLIENT_GONE, Call, Service
from saeguard.serving.http.shapes import ChatShape, TextShape
from saeguard.serving.policy import rules_of

Handler = Callable[[Request, Call], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
    """The application of one server."""
    routes = _Routes(service)
    cors = Middleware(
        CORSMiddleware, allow_origins=service.config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    return Starlette(
        routes=[
            routes.of("/v1/chat/completions", routes.chat, "POST"),
            routes.of("/v1/completions", routes.completion, "POST"),
            routes.of("/v1/models", routes.models),
            routes.of("/v1/models/{model:path}", routes.model),
            routes.of("/v1/guardrails", routes.guardrails),
            routes.of("/v1/guardrails/trace", routes.trace, "POST"),
            *page_routes(),
            Route("/healthz", routes.ready),
            Route("/healthz/ready", routes.ready),
            Route("/healthz/live", routes.live),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
        ],
        middleware=[cors] if service.config.cors_origins else [],
        exception_handlers={HTTPException: _http_error, 500: _fault},
    )


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    def of(self, path: str, handler: Handler, method: str = "GET") -> Route:
        """A route that needs a key, is measured and logged, and answers every refusal in OpenAI's form."""

        async def endpoint(request: Request) -> Response:
            call = Call(self._service, path)
            try:
                self._service.authorise(request)
                response = await handler(request, call)
            except ApiError as error:
                call.end(error.status, error.body["error"]["code"])
                response = error.response()
            except ClientGone:
                call.end(CLIENT_GONE)
                response = Response(status_code=CLIENT_GONE)
            response.headers["X-Request-Id"] = call.id
            return response

        return Route(path, endpoint, methods=[method])

    async def chat(self, request: Request, call: Call) -> Response:
        return await self._complete(request, call, ChatRequest)

    async def completion(self, request: Request, call: Call) -> Response:
        return await self._complete(request, call, CompletionRequest)

    async def _complete(
        self, request: Request, call: Call, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        config = self._service.config
        body = await read_body(request, most=config.max_body, seconds=config.body_seconds)
        wanted: ChatRequest | CompletionRequest = parse(kind, body)
        call.prompt = wanted.model_dump(include={"messages", "prompt"}) if config.log_prompts else None
        call.ask = await unless_gone(request, understand(self._service, wanted))
        call.exchange = Exchange(self._service.engine, call.ask)
        call.exchange.begin()
        shape = (ChatShape if kind is ChatRequest else TextShape)(self._service.tokenizer)
        answering = Answering(self._service, call, shape, call.ask, call.exchange)
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return await answering.streamed(request, usage=usage)
        return await answering.whole(request)

    async def models(self, _request: Request, call: Call) -> Response:
        call.end(200)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, call: Call) -> Response:
        check_model(self._service, request.path_params["model"])
        call.end(200)
        return JSONResponse(self._model())

    async def guardrails(self, _request: Request, call: Call) -> Response:
        call.end(200)
        return JSONResponse(describe(self._service))

    async def trace(self, request: Request, call: Call) -> Response:
        return await trace(self._service, request, call)

    def _model(self) -> dict[str, Any]:
        service = self._service
        entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "saeguard"}
        if not service.config.verdicts:
            return entry
        rows = [
            {"id": name, "rule": rule.name, "action": rule.action, "threshold": rule.threshold}
            for name, its in service.guardrails.items()
            for rule in rules_of(its)
        ]
        return entry | {"saeguard": rows}

    async def ready(self, _request: Request) -> Response:
        engine = self._service.engine
        status = {
            "status": "ready" if engine.ready else "not ready",
            "waiting": engine.waiting,
            "running": engine.running,
        }
        return JSONResponse(status | ({"fault": engine.fault} if engine.fault else {}), 200 if engine.ready else 503)

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"status": "live", "time": int(time.time())})

    async def metrics(self, _request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(description())


async def _http_error(_request: Request, error: Exception) -> Response:
    """A path or method there is not."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    message = error.detail if isinstance(error, HTTPException) else str(error)
    return ApiError(status, message, code="not_found" if status == 404 else None).response()


async def _fault(_request: Request, _error: Exception) -> Response:
    """A fault of this server's own."""
    return ApiError(500, "The server had an error.", kind="server_error").response()

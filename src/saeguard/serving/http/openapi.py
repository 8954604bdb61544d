"""The server's own description, from the models that it checks requests with."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from saeguard.serving.http.errors import error_schema
from saeguard.serving.http.schema import ChatRequest, CompletionRequest, TraceRequest

REFUSALS = {
    "400": "not understood, or past a limit", "401": "no key, or a wrong one", "403": "guardrails cannot be chosen",
    "404": "no such model or guardrail", "408": "took too long", "413": "too large", "415": "not JSON",
    "429": "no room to wait", "503": "shutting down, or the engine has failed",
}  # fmt: skip
ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"}, "object": {"type": "string"}, "created": {"type": "integer"},
        "model": {"type": "string"}, "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"}, "saeguard": {"type": "array", "items": {"$ref": "#/components/schemas/Verdict"}},
    },
}  # fmt: skip
VERDICT = {
    "type": "object",
    "description": "What one rule of a guardrail decided on one choice; first_token counts from the prompt's first.",
    "required": ["index", "id", "rule", "action", "statistic", "threshold", "triggered", "first_token"],
    "properties": {
        "index": {"type": "integer"}, "id": {"type": "string"}, "rule": {"type": "string"},
        "action": {"enum": ["clamp", "refuse", "monitor"]}, "statistic": {"type": ["number", "null"]},
        "threshold": {"type": "number"}, "triggered": {"type": "boolean"}, "first_token": {"type": ["integer", "null"]},
    },
}  # fmt: skip
OBJECT = {"type": "object"}


@cache
def description() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    kinds = (ChatRequest, CompletionRequest, TraceRequest)
    _, models = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    schemas = models["$defs"] | {"Error": error_schema(), "Answer": ANSWER, "Verdict": VERDICT}
    unknown = _answers(OBJECT, "401", "404")
    return {
        "openapi": "3.1.0",
        "info": {"title": "saeguard", "version": "1", "description": "A guarded model behind OpenAI's interface."},
        "paths": {
            "/v1/chat/completions": {"post": _completion("ChatRequest")},
            "/v1/completions": {"post": _completion("CompletionRequest")},
            "/v1/guardrails": {"get": {"responses": _answers(OBJECT, "401"), "security": [{"key": []}]}},
            "/v1/guardrails/trace": {"post": _trace()},
            "/v1/models": {"get": {"responses": _answers(OBJECT, "401"), "security": [{"key": []}]}},
            "/v1/models/{model}": {
                "get": {"responses": unknown, "parameters": [_path("model")], "security": [{"key": []}]}
            },
            "/healthz": {"get": {"responses": {"200": _json("ready", OBJECT), "503": _json("not ready", OBJECT)}}},
            "/metrics": {"get": {"responses": {"200": {"description": "metrics", "content": {"text/plain": {}}}}}},
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _completion(kind: str) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}}
    answers = _answers({"$ref": "#/components/schemas/Answer"}, *REFUSALS)
    answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {"requestBody": body, "responses": answers, "security": [{"key": []}]}


def _trace() -> dict[str, Any]:
    body = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TraceRequest"}}},
    }
    return {"requestBody": body, "responses": _answers(OBJECT, *REFUSALS), "security": [{"key": []}]}


def _answers(found: dict[str, Any], *refusals: str) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    return {"200": _json("the answer", found)} | {status: _json(REFUSALS[status], error) for status in refusals}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}

"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with a fitting status."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from saeguard.errors import GuardrailError

INVALID = "invalid_request_error"


class ApiError(GuardrailError):
    """A request that is refused, with the HTTP status that says why."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as an answer; where asking again may help, it says when."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's body."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"We could not parse the JSON body of your request. {first['msg']}", code="json_invalid")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def unavailable(message: str) -> ApiError:
    """The server cannot answer now."""
    return ApiError(503, message, kind="server_error", code="unavailable")


def overloaded(message: str) -> ApiError:
    """There is no room to wait."""
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded")


def late(message: str) -> ApiError:
    """The request took too long."""
    return ApiError(408, message, kind="timeout_error", code="timeout")


def error_schema() -> dict[str, Any]:
    """JSON schema of an error."""
    text: dict[str, Any] = {"type": "string"}
    maybe: dict[str, Any] = {"type": ["string", "null"]}
    inner = {"message": text, "type": text, "param": maybe, "code": maybe}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": list(inner), "properties": inner}},
    }

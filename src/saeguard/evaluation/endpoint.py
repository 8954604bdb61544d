"""A chat model behind any OpenAI-compatible endpoint, asked one thing at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.request import Request, urlopen

from saeguard.errors import EndpointError


@dataclass(frozen=True)
class ChatEndpoint:
    """The address of the endpoint (ending in /v1), the name of the model there, and the key, where it wants one."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0

    def ask(self, text: str, max_tokens: int) -> str:
        """What it says. Raises `EndpointError` where it cannot be reached or answers in another form."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": max_tokens,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            request = Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
            with urlopen(request, timeout=self.timeout_seconds) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{self.model} at {self.url} cannot be reached or answers in another form: {error!r}. Check the "
                "address. What is finished is kept."
            ) from error

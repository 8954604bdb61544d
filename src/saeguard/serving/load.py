"""Clients that load a server, and others that behave badly beside them. Standard library only."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
PATIENCE = 600.0
OVERSIZE = 1_200_000
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """An answer as a client sees it; `text` and the rest are empty where the status is an error."""

    status: int
    text: str = ""
    verdicts: tuple[Mapping[str, Any], ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    whole: bool = False


class Target:
    """A server: its address, and the name of its model."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.model = str(parts.hostname), int(parts.port or 80), model

    def ask(self, messages: list[dict[str, str]], *, tokens: int, stream: bool) -> Reply:
        """One greedy answer. Raises `OSError` or `HTTPException` where the connection breaks."""
        connection = self._post(self.body(messages, tokens=tokens, stream=stream))
        try:
            response = connection.getresponse()
            if response.status != 200:
                return Reply(response.status)
            return _streamed(response) if stream else _whole(json.load(response))
        finally:
            connection.close()

    def body(self, messages: list[dict[str, str]], **fields: Any) -> bytes:
        """The bytes of a request."""
        options: dict[str, Any] = {"max_tokens": fields.pop("tokens", 8), "temperature": 0}
        if fields.get("stream"):
            options["stream_options"] = {"include_usage": True}
        return json.dumps({"model": self.model, "messages": messages} | options | fields).encode()

    def get(self, path: str) -> bytes:
        """What a path answers."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def status(self, body: bytes) -> int:
        """The status with which a body is answered; 413 too where the server closes before it has read it all."""
        try:
            connection = self._post(body)
            try:
                return connection.getresponse().status
            finally:
                connection.close()
        except (ConnectionError, http.client.RemoteDisconnected):
            return 413

    def _post(self, body: bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.request("POST", CHAT, body, HEADERS)
        return connection


def _whole(body: Mapping[str, Any]) -> Reply:
    usage = body["usage"]
    return Reply(
        200, body["choices"][0]["message"]["content"], tuple(body.get("saeguard", ())), usage["prompt_tokens"],
        usage["completion_tokens"], whole=True,
    )  # fmt: skip


def _streamed(response: http.client.HTTPResponse) -> Reply:
    text, verdicts, usage, whole = "", (), {"prompt_tokens": 0, "completion_tokens": 0}, False
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            whole = True
        elif data:
            chunk = json.loads(data)
            text += "".join(choice["delta"].get("content", "") for choice in chunk.get("choices", ()))
            verdicts = tuple(chunk.get("saeguard", verdicts))
            usage = chunk.get("usage") or usage
    return Reply(200, text, verdicts, usage["prompt_tokens"], usage["completion_tokens"], whole)


class Nuisance:
    """Badly behaved clients: each call does one bad thing, and says whether the server took it as it should."""

    def __init__(self, target: Target, messages: list[dict[str, str]], draw: random.Random) -> None:
        self._target, self._messages, self._draw = target, messages, draw

    def kinds(self) -> dict[str, Callable[[], bool]]:
        """By name."""
        target, body = self._target, self._target.body
        say = self._messages
        return {
            "hang up while streaming": lambda: self._hang_up(stream=True),
            "hang up while waiting": lambda: self._hang_up(stream=False),
            "oversized": lambda: target.status(b"{" + b" " * OVERSIZE + b"}") == 413,
            "malformed": lambda: target.status(body(say)[: self._draw.randrange(1, 40)]) == 400,
            "unknown model": lambda: target.status(body(say, model="nope")) == 404,
            "enormous n": lambda: target.status(body(say, n=10**9)) == 400,
            "not UTF-8": lambda: target.status(b"\xff\xfe\x00") == 400,
            "slow": self._slow,
        }

    def _connect(self) -> socket.socket:
        return socket.create_connection((self._target.host, self._target.port), timeout=PATIENCE)

    def _head(self, length: int) -> bytes:
        return (
            f"POST {CHAT} HTTP/1.1\r\nHost: {self._target.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    def _hang_up(self, *, stream: bool) -> bool:
        body = self._target.body(self._messages, tokens=200, stream=stream)
        with self._connect() as connection:
            connection.sendall(self._head(len(body)) + body)
            if stream:
                connection.recv(self._draw.randrange(1, 2000))
            else:
                time.sleep(self._draw.random())
        return True

    def _slow(self) -> bool:
        """Sends half a request and waits."""
        with self._connect() as connection:
            connection.sendall(self._head(100) + b'{"model": ')
            return b" 408 " in connection.recv(200)


def memory(target: Target) -> float | None:
    """Resident memory of the server in MB, by its own metrics; None where they do not say."""
    for line in target.get("/metrics").decode().splitlines():
        if line.startswith("process_resident_memory_bytes "):
            return float(line.split()[1]) / 2**20
    return None

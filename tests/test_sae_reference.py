"""References that cannot be fetched: each answer of the hub, by its own client, is an error that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import saeguard
from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder

ASK = """
import json, sys
from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder
for text in sys.argv[1:]:
    try:
        SparseAutoencoder.load(text)
    except SAEError as error:
        print(json.dumps([text, str(error)]))
"""
FILES = ["layers.10/cfg.json", "layers.10/sae.safetensors", "layers.9/cfg.json"]
ANSWERS = {
    "gated": (403, "GatedRepo", "Accept it at https://huggingface.co/o/gated, then log in: hf auth login"),
    "asks": (401, "GatedRepo", "Accept it at https://huggingface.co/o/asks"),
    "forbidden": (403, "", "Accept it at https://huggingface.co/o/forbidden"),
    "private": (401, "RepoNotFound", "no such repository, or it is private"),
    "missing": (404, "RepoNotFound", "no such repository, or it is private"),
    "old": (404, "RevisionNotFound", "no revision v9"),
    "broken": (500, "", "status 500"),
}


class Hub(BaseHTTPRequestHandler):
    """A hub that has one repository whose files can be listed, and refuses all else in the ways a hub does."""

    def do_GET(self) -> None:
        name = self.path.split("/")[4].partition("?")[0]
        if name == "there":
            tree = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in FILES]
            info = {"id": "o/there", "sha": "0" * 40, "siblings": [{"rfilename": path} for path in FILES]}
            self.answer(200, json.dumps(tree if "/tree/" in self.path else info).encode())
        else:
            status, code, _ = ANSWERS[name]
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


def ask(endpoint: str, home: str, *texts: str) -> dict[str, str]:
    """What each text is answered with, in a process whose hub is the given one."""
    outside = {"HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    root = str(Path(saeguard.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", ASK, *texts], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, **outside, "PYTHONPATH": root},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return dict(json.loads(line) for line in found.stdout.splitlines())


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    texts = [f"o/{name}@v9:x" if name == "old" else f"o/{name}:x" for name in ANSWERS]
    yield ask(
        f"http://127.0.0.1:{server.server_port}", str(tmp_path_factory.mktemp("home")),
        *texts, "o/there:layers.11", "o/there:layers.1O",
    )  # fmt: skip
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_hub_refuses(errors, name):
    text = f"o/{name}@v9:x" if name == "old" else f"o/{name}:x"
    assert f"cannot fetch o/{name} from the Hugging Face hub" in errors[text]
    assert ANSWERS[name][2] in errors[text]


def test_what_a_repository_does_not_have_is_answered_with_the_nearest_it_has(errors):
    assert "o/there has no layers.11. Nearest: layers.10" in errors["o/there:layers.11"]
    assert "layers.10" in errors["o/there:layers.1O"]


def test_a_hub_that_cannot_be_reached(tmp_path):
    assert "cannot be reached" in ask("http://127.0.0.1:9", str(tmp_path), "o/r:x")["o/r:x"]


def test_a_hub_that_must_not_be_asked():
    with pytest.raises(SAEError, match="HF_HUB_OFFLINE"):
        SparseAutoencoder.load("o/never-fetched:x")

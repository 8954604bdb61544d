"""Descriptions from a real HTTP server that speaks the chat protocol: what is asked, kept, retried and refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from chat_server import Server, serving
from saeguard.errors import EndpointError
from saeguard.explain.describing import Endpoint, described, question

CONTEXT = {"corpus": "a", "activation": 2.0, "before": "the pale", "token": " moon", "after": " rose"}
ROWS = [{"feature": j, "contexts": [CONTEXT | {"before": f"passage {j}:"}]} for j in range(6)]


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as server:
        yield server


@pytest.fixture
def endpoint(server) -> Endpoint:
    return Endpoint(server.url, "a-model", api_key="secret", concurrency=2, timeout=5.0, attempts=3, pause=0.0)


def test_every_row_is_asked_about_once(server, endpoint, tmp_path):
    done = []
    found = described(ROWS, endpoint, tmp_path / "kept.jsonl", done.append)
    assert found == {j: f"about {j}:<< moon>> rose" for j in range(6)}
    assert sum(done) == len(ROWS) == len(server.asked)
    assert {body["path"] for body in server.asked} == {"/v1/chat/completions"}
    assert {body["model"] for body in server.asked} == {"a-model"}
    assert sorted(b["messages"][0]["content"] for b in server.asked) == sorted(map(question, ROWS))


@pytest.mark.parametrize(("key", "sent"), [("secret", "Bearer secret"), (None, "Bearer none")])
def test_only_the_key_that_was_given_is_sent(server, endpoint, tmp_path, monkeypatch, key, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    described(ROWS[:1], Endpoint(server.url, "a-model", key), tmp_path / "kept.jsonl")
    assert server.keys == [sent]
    assert "secret" not in repr(endpoint)


def test_what_is_described_is_not_asked_for_again(server, endpoint, tmp_path):
    kept = tmp_path / "kept.jsonl"
    first = described(ROWS[:4], endpoint, kept)
    with kept.open("a") as file:
        file.write('{"feature": 5, "by": "a-mod')  # what a killed run leaves
    done = []
    assert described(ROWS, endpoint, kept, done.append).items() >= first.items()
    assert (len(server.asked), sum(done)) == (6, 6)
    assert described(ROWS, endpoint, kept).keys() == set(range(6))
    assert len(server.asked) == 6
    described(ROWS[:1], Endpoint(server.url, "another-model", pause=0.0), kept)
    assert len(server.asked) == 7


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(server, endpoint, tmp_path, status):
    server.fail = [status, status]
    assert described(ROWS[:1], endpoint, tmp_path / "kept.jsonl") == {0: "about 0:<< moon>> rose"}
    assert len(server.asked) == 3


@pytest.mark.parametrize(("fail", "asked"), [([500] * 9, 3), ([401], 1), ([404], 1), ([422], 1)])
def test_a_server_that_refuses(server, endpoint, tmp_path, fail, asked):
    server.fail = fail
    with pytest.raises(EndpointError, match=r"asked a-model at http.*run again"):
        described(ROWS[:1], endpoint, tmp_path / "kept.jsonl")
    assert len(server.asked) == asked


def test_a_failure_keeps_what_came_before(server, endpoint, tmp_path):
    server.fail = [200, 200, 401]
    one_by_one = Endpoint(server.url, "a-model", concurrency=1)
    with pytest.raises(EndpointError):
        described(ROWS, one_by_one, tmp_path / "kept.jsonl")
    assert len(described(ROWS, one_by_one, tmp_path / "kept.jsonl")) == 6
    assert len(server.asked) <= 6 + 2


def test_a_server_that_is_slow(server, tmp_path):
    server.slow = 0.5
    hasty = Endpoint(server.url, "a-model", timeout=0.05, attempts=2, pause=0.0)
    with pytest.raises(EndpointError, match="2 times"):
        described(ROWS[:1], hasty, tmp_path / "kept.jsonl")


def test_nobody_there(server, tmp_path):
    nobody = Endpoint("http://127.0.0.1:9/v1", "a-model", attempts=2, pause=0.0)
    with pytest.raises(EndpointError, match="2 times"):
        described(ROWS[:1], nobody, tmp_path / "kept.jsonl")


@pytest.mark.parametrize("raw", [b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {}}]}'])
def test_an_answer_that_is_none(server, endpoint, tmp_path, raw):
    server.raw = raw
    with pytest.raises(EndpointError, match=r"not as a chat endpoint|empty answer"):
        described(ROWS[:1], endpoint, tmp_path / "kept.jsonl")

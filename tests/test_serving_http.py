"""The server, on a real port: OpenAI's shapes, verdicts, refusals, limits, and errors that say what is wrong."""

# ruff: noqa: E402  (what needs the extra comes after the question whether it is installed)
from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

import torch

from conftest import SENTENCES, make_guardrail, make_model, make_sae
from saeguard.attacks.spelling import zero_width
from saeguard.choices import REFUSAL
from saeguard.errors import ProofError, UsageError
from saeguard.generate import prompt_ids
from saeguard.serving.config import ServeConfig
from saeguard.serving.http.server import service
from saeguard.serving.http.service import read_keys
from saeguard.serving.policy import load_guardrails
from served import NAME, Served, proven, served
from tiny import generate, hooks_on, with_rule

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 8}


def chat(content: str = SENTENCES[0], **fields: Any) -> dict[str, Any]:
    return GREEDY | {"messages": [{"role": "user", "content": content}]} | fields


def text(prompt: Any = SENTENCES[1], **fields: Any) -> dict[str, Any]:
    return GREEDY | {"prompt": prompt} | fields


@pytest.fixture(scope="module")
def topic(llama, tokenizer):
    return proven(make_guardrail(llama, tokenizer, make_sae("relu"), 2), llama, tokenizer)


@pytest.fixture(scope="module")
def here(tokenizer, topic) -> Iterator[Served]:
    """A server with one guardrail that clamps, one that refuses, and leave to choose. Its model is its own."""
    model = make_model("llama")
    other = proven(
        make_guardrail(model, tokenizer, make_sae("topk"), 1, features=(1, 5, 9)), model, tokenizer, action="refuse"
    )
    with served(model, tokenizer, {"topic": topic, "other": other}, allow_guardrail_choice=True) as found:
        yield found


@pytest.fixture
def client(here) -> Iterator[Any]:
    with httpx.Client(base_url=here.url, timeout=60) as found:
        yield found


def only(*ids: str) -> dict[str, Any]:
    return {"saeguard": {"guardrails": list(ids)}}


def events(response: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which must end as streams end."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def expected(model: Any, tokenizer: Any, guardrail: Any, ids: list[int]) -> tuple[str, Any]:
    """Text and verdict of one prompt, alone."""
    row = torch.tensor([ids])
    with guardrail.attach(model, tokenizer) as guard:
        whole = generate(model, row, max_new_tokens=8, min_new_tokens=0)
        verdict = guard.judge(whole[:, :-1])[0]
    return tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True), verdict


def test_a_chat_is_answered_and_judged(client, llama, tokenizer, topic):
    response = client.post(CHAT, json=chat(SENTENCES[0], **only("topic")))
    body = response.json()
    assert response.status_code == 200
    ids = prompt_ids(tokenizer, SENTENCES[0])
    said, verdict = expected(llama, tokenizer, topic, ids)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": said, "refusal": None}
    assert body["choices"][0]["finish_reason"] in {"stop", "length"}
    assert body["usage"]["prompt_tokens"] == len(ids)
    row = body["saeguard"][0]
    assert (row["id"], row["rule"], row["action"]) == ("topic", "topic", "clamp")
    assert row["statistic"] == pytest.approx(verdict.statistic, abs=1e-4)
    assert (row["triggered"], row["first_token"]) == (verdict.triggered, verdict.first_token)
    assert json.loads(response.headers["X-Saeguard-Verdict"]) == body["saeguard"]
    assert response.headers["X-Saeguard-Triggered"] == ("topic" if verdict.triggered else "none")


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_a_stream_is_the_whole_answer_in_parts(client, route):
    body = (chat if route == CHAT else text)(SENTENCES[2], n=2, logprobs=True if route == CHAT else 2, **only("topic"))
    whole = client.post(route, json=body).json()
    response = client.post(route, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "X-Saeguard-Verdict" in response.headers
    *chunks, usage = events(response)
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    for index, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        if route == CHAT:
            assert parts[0]["delta"] == {"role": "assistant", "content": ""}
            said = "".join(part["delta"].get("content", "") for part in parts)
            assert said == choice["message"]["content"]
            told = [row for part in parts if part["logprobs"] for row in part["logprobs"]["content"]]
            assert told == choice["logprobs"]["content"]
        else:
            assert "".join(part["text"] for part in parts) == choice["text"]
            told = [row for part in parts if part["logprobs"] for row in part["logprobs"]["token_logprobs"]]
            assert told == choice["logprobs"]["token_logprobs"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert [row for chunk in chunks for row in chunk.get("saeguard", [])] == whole["saeguard"]


def test_text_ids_and_several_prompts(client, tokenizer):
    ids = [1, *tokenizer(SENTENCES[1], add_special_tokens=False).input_ids]
    one, same, many = (
        client.post(TEXT, json=text(p)).json() for p in (SENTENCES[1], ids, [SENTENCES[1], SENTENCES[2]])
    )
    assert one["choices"][0]["text"] == same["choices"][0]["text"] == many["choices"][0]["text"]
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    assert [row["index"] for row in many["saeguard"]] == [0, 0, 1, 1]
    assert client.post(TEXT, json=text([ids, ids])).json()["choices"][1]["text"] == one["choices"][0]["text"]


def test_a_header_is_never_too_long_for_a_proxy(client):
    response = client.post(TEXT, json=text(n=16, max_tokens=1))
    assert len(response.json()["saeguard"]) == 32
    assert "X-Saeguard-Verdict" not in response.headers
    assert "X-Saeguard-Triggered" in response.headers


def test_parts_of_a_message_and_developers(client):
    parts = [{"type": "text", "text": SENTENCES[0][:10]}, {"type": "text", "text": SENTENCES[0][10:]}]
    whole = client.post(CHAT, json=chat(SENTENCES[0])).json()
    assert client.post(CHAT, json=chat(parts)).json()["choices"] == whole["choices"]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    system = [messages[0] | {"role": "system"}, messages[1]]
    answers = [client.post(CHAT, json=GREEDY | {"messages": m}).json()["choices"] for m in (messages, system)]
    assert answers[0] == answers[1]


def firing(guardrail: Any) -> str:
    return str(guardrail.evidence["proof"]["fires"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_a_normal_answer(client, here, stream):
    response = client.post(TEXT, json=text(firing(here.service.guardrails["other"]), stream=stream, **only("other")))
    assert response.headers["X-Saeguard-Triggered"] == "other"
    if stream:
        parts = [part for event in events(response) for part in event["choices"]]
        assert "".join(part["text"] for part in parts) == REFUSAL
        assert parts[-1]["finish_reason"] == "content_filter"
    else:
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (REFUSAL, "content_filter")
        assert response.json()["usage"]["completion_tokens"] == 0


def test_a_refusal_while_writing_replaces_the_answer_or_follows_it(llama, tokenizer, topic):
    """The threshold is set between what is read in the prompt and what is read in prompt and answer."""
    found = None
    for prompt in SENTENCES:
        ids = [1, *tokenizer(prompt, add_special_tokens=False).input_ids]
        monitor = with_rule(topic, action="monitor", threshold=1e9)
        with monitor.attach(llama, tokenizer) as guard:
            whole = generate(llama, torch.tensor([ids]), max_new_tokens=40)
            low, high = guard.judge(torch.tensor([ids]))[0].statistic, guard.judge(whole)[0].statistic
        if high > low and high > 0:
            found = (prompt, (low + high) / 2)
            break
    assert found
    prompt, threshold = found
    late = with_rule(topic, action="refuse", threshold=threshold)
    with served(llama, tokenizer, {"late": late}, refusal="No.", refusal_reason="stop") as here:
        whole = httpx.post(here.url + TEXT, json=text(prompt, max_tokens=40), timeout=60).json()
        stream = httpx.post(here.url + TEXT, json=text(prompt, max_tokens=40, stream=True), timeout=60)
    parts = [part for event in events(stream) for part in event["choices"]]
    said = "".join(part["text"] for part in parts)
    assert whole["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "No.",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert whole["usage"]["completion_tokens"] > 0
    assert said.endswith("\n\nNo.")
    assert len(said) > len("\n\nNo.")
    assert stream.headers["X-Saeguard-Triggered"] == "none"


LONG = "word " * 2000
BAD = [
    ("another model", CHAT, chat(model="gpt-9"), 404, "model_not_found"),
    ("unknown guardrail", CHAT, chat(**only("nope")), 404, "guardrail_not_found"),
    ("unknown field", CHAT, chat(banana=1), 400, "unknown_parameter"),
    ("no messages", CHAT, chat(messages=[]), 400, "invalid_value"),
    ("messages of the wrong type", CHAT, chat(messages="hi"), 400, "invalid_value"),
    ("content of the wrong type", CHAT, chat(messages=[{"role": "user", "content": 3}]), 400, "invalid_value"),
    ("unknown role", CHAT, chat(messages=[{"role": "robot", "content": "x"}]), 400, "invalid_value"),
    ("an image", CHAT, chat([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "invalid_value"),
    ("tools", CHAT, chat(tools=[{"type": "function"}]), 400, "invalid_value"),
    ("enormous n", CHAT, chat(n=10**30), 400, "invalid_value"),
    ("large n", CHAT, chat(n=1000), 400, "invalid_value"),
    ("n past the operator's limit", CHAT, chat(n=100), 400, "invalid_value"),
    ("n times prompts", TEXT, text(["a"] * 9, n=9), 400, "invalid_value"),
    ("no n", CHAT, chat(n=0), 400, "invalid_value"),
    ("n as text", CHAT, chat(n="2"), 400, "invalid_value"),
    ("n as truth", CHAT, chat(n=True), 400, "invalid_value"),
    ("enormous max_tokens", CHAT, chat(max_tokens=10**9), 400, "invalid_value"),
    ("negative max_tokens", CHAT, chat(max_tokens=-1), 400, "invalid_value"),
    ("temperature", CHAT, chat(temperature=9), 400, "invalid_value"),
    ("too long a prompt", TEXT, text(LONG), 400, "context_length_exceeded"),
    ("too long a chat", CHAT, chat(LONG), 400, "context_length_exceeded"),
    ("no prompt", TEXT, GREEDY, 400, "invalid_value"),
    ("token ids past the vocabulary", TEXT, text([5, 10**6]), 400, None),
    ("negative token ids", TEXT, text([5, -1]), 400, "invalid_value"),
    ("mixed prompts", TEXT, text(["a", 1]), 400, "invalid_value"),
    ("empty ids", TEXT, text([]), 400, "invalid_value"),
    ("empty stop", TEXT, text(stop=""), 400, "invalid_value"),
    ("top_logprobs alone", CHAT, chat(top_logprobs=2), 400, "invalid_value"),
    ("a list for a body", CHAT, [1], 400, "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "status", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_named(client, route, body, status, code):
    response = client.post(route, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{bad",
        b"",
        b"\xff\xfe\x00",
        b'{"model":"\\ud800"}',
        b"[" * 100_000,
        b'{"model":"tiny","temperature":NaN}',
        b"\x00",
    ],
)
def test_bytes_that_are_no_json(client, body):
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_only_json_is_taken(client):
    response = client.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_paths_and_methods_there_are_not(client):
    for method, path, status in (("GET", "/nope", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)):
        response = client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_models_are_listed(client):
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [NAME]
    assert client.get(f"/v1/models/{NAME}").json() == models["data"][0]
    assert {row["id"] for row in models["data"][0]["saeguard"]} == {"topic", "other"}
    assert client.get("/v1/models/some/other").status_code == 404


def test_no_guardrail_where_the_request_may_say_so(client, llama, tokenizer):
    ids = prompt_ids(tokenizer, SENTENCES[0])
    whole = generate(llama, torch.tensor([ids]), max_new_tokens=8, min_new_tokens=0)
    body = client.post(CHAT, json=chat(SENTENCES[0], **only())).json()
    assert body["choices"][0]["message"]["content"] == tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    assert body["saeguard"] == []


def test_the_operator_may_forbid_choice_and_hide_verdicts(llama, tokenizer, topic):
    with served(llama, tokenizer, {"topic": topic}, verdicts=False) as here:
        response = httpx.post(here.url + CHAT, json=chat(), timeout=60)
        refused = httpx.post(here.url + CHAT, json=chat(**only("topic")), timeout=60)
        stream = httpx.post(here.url + CHAT, json=chat(stream=True), timeout=60)
        models = httpx.get(here.url + "/v1/models").json()
    assert "saeguard" not in response.text + stream.text + json.dumps(models["data"][0].get("saeguard", ""))
    assert not any(name.lower().startswith("x-saeguard") for name in (*response.headers, *stream.headers))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "guardrail_choice_not_allowed")


def test_keys(llama, tokenizer, topic, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n second \n", "utf-8")
    keys = read_keys(str(file), "third")
    assert keys == (b"first", b"second", b"third")
    with served(llama, tokenizer, {"topic": topic}, keys=keys) as here:
        for given, status in (
            (None, 401), ("Bearer wrong", 401), ("Basic first", 401), ("Bearer", 401), ("Bearer fírst", 401),
            ("Bearer first", 200), ("bearer third", 200),
        ):  # fmt: skip
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            response = httpx.get(here.url + "/v1/models", headers=headers)
            assert response.status_code == status, given
            if status == 401:
                assert response.json()["error"]["code"] in {"missing_api_key", "invalid_api_key"}
        assert httpx.post(here.url + CHAT, json=chat()).status_code == 401
        assert httpx.get(here.url + "/healthz").status_code == 200
        assert "first" not in here.log.getvalue()


def test_a_file_without_keys_is_refused(tmp_path):
    (tmp_path / "keys").write_text("# none\n", "utf-8")
    for path in (tmp_path / "keys", tmp_path / "missing"):
        with pytest.raises(UsageError, match="api-keys-file"):
            read_keys(str(path))


def test_requests_too_large_and_too_slow(llama, tokenizer, topic):
    with served(llama, tokenizer, {"topic": topic}, max_body=2000, body_seconds=0.3, request_seconds=0.05) as here:
        large = httpx.post(here.url + CHAT, json=chat("x" * 3000))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        chunked = httpx.post(
            here.url + CHAT, content=(b"x" * 1000 for _ in range(5)), headers={"Content-Type": "application/json"}
        )
        assert chunked.status_code == 413
        address = here.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 50\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        long = httpx.post(here.url + TEXT, json=text(n=16, max_tokens=190), timeout=60)
        assert (long.status_code, long.json()["error"]["code"]) == (408, "timeout")
        stream = httpx.post(here.url + TEXT, json=text(n=16, max_tokens=190, stream=True), timeout=60)
        assert json.loads(stream.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        here.idle()


def test_too_many_at_once(llama, tokenizer, topic):
    with served(llama, tokenizer, {"topic": topic}, max_batch=1, max_waiting=2) as here:
        refused = httpx.post(here.url + TEXT, json=text(n=4, max_tokens=100), timeout=60)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert refused.headers["Retry-After"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_written_for_no_longer(here, stream):
    body = json.dumps(text(n=4, max_tokens=200, stream=stream, **only())).encode()
    address = here.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        while not here.service.engine.running:
            time.sleep(0.002)
    here.idle()
    end = time.monotonic() + 10
    while here.lines[-1]["status"] != 499:
        assert time.monotonic() < end, here.lines[-1]
        time.sleep(0.01)
    assert here.lines[-1]["completion_tokens"] < 4 * 200


def test_many_at_once_get_their_own_answers(here):
    bodies = [text(SENTENCES[i % 7][: 5 + i], max_tokens=3 + i % 5, stream=bool(i % 2)) for i in range(24)]

    async def ask(client: Any, body: dict[str, Any]) -> str:
        response = await client.post(TEXT, json=body)
        if not body["stream"]:
            return str(response.json()["choices"][0]["text"])
        return "".join(part["text"] for event in events(response) for part in event["choices"])

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=here.url, timeout=120) as client:
            return list(await asyncio.gather(*(ask(client, body) for body in bodies)))

    together = asyncio.run(all_at_once())
    with httpx.Client(base_url=here.url, timeout=60) as client:
        alone = [client.post(TEXT, json=body | {"stream": False}).json()["choices"][0]["text"] for body in bodies]
    assert together == alone


def test_metrics(client, here):
    def value(name: str, *labels: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(name) and all(one in line for one in labels)
        )

    before = value("saeguard_triggered_total", 'guardrail="other"', 'action="refuse"')
    requests = value("saeguard_requests_total", CHAT, '"404"')
    read = value("saeguard_tokens_total", '"read"')
    client.post(TEXT, json=text(firing(here.service.guardrails["other"]), **only("other")))
    client.post(CHAT, json=chat(model="nope"))
    assert value("saeguard_triggered_total", 'guardrail="other"') == before + 1
    assert value("saeguard_requests_total", CHAT, '"404"') == requests + 1
    assert value("saeguard_tokens_total", '"read"') > read
    assert value("saeguard_hot_density_count", 'guardrail="other"') > 0
    assert value("saeguard_statistic_relative_count", 'guardrail="other"') > 0
    assert value("saeguard_first_token_seconds_count") > 0
    assert value("saeguard_ready") == 1
    assert value("saeguard_running") == 0


def test_the_log_holds_no_text_unless_asked(client, here, llama, tokenizer, topic):
    client.post(CHAT, json=chat("a secret question"))
    assert "secret" not in here.log.getvalue()
    line = next(line for line in reversed(here.lines) if line["event"] == "request")
    assert {"id", "route", "status", "seconds", "prompt_tokens", "completion_tokens", "triggered"} <= line.keys()
    with served(llama, tokenizer, {"topic": topic}, log_prompts=True) as other:
        httpx.post(other.url + CHAT, json=chat("a secret question"), timeout=60)
        assert "a secret question" in other.log.getvalue()


def test_the_end_finishes_what_runs_and_refuses_the_rest(llama, tokenizer, topic):
    with served(llama, tokenizer, {"topic": topic}) as here, httpx.Client(base_url=here.url, timeout=60) as client:
        with client.stream("POST", TEXT, json=text(max_tokens=150, stream=True)) as running:
            lines = running.iter_lines()
            next(lines)
            here.service.engine.drain()
            for path, status in ((TEXT, 503), ("/healthz", 503), ("/healthz/live", 200)):
                method = "POST" if path == TEXT else "GET"
                other = httpx.request(method, here.url + path, json=text() if method == "POST" else None)
                assert other.status_code == status
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"


def test_a_guardrail_without_a_gate_is_proved_by_firing_alone(llama, tokenizer):
    sae = make_sae("jumprelu")
    passages = {"7": [{"corpus": "forget", "before": "", "token": SENTENCES[0], "after": ""}]}
    always = make_guardrail(llama, tokenizer, sae, 2, threshold=-1.0, evidence={"passages": passages})
    with service(llama, tokenizer, {"topic": always}, ServeConfig()):
        pass
    assert hooks_on(llama) == 0


def test_nothing_starts_that_does_not_fire_or_always_does(llama, tokenizer, topic):
    for threshold, found in ((1e9, "did not fire"), (-1.0, "every ordinary text fired")):
        with (
            pytest.raises(ProofError, match=found),
            service(llama, tokenizer, {"topic": with_rule(topic, threshold=threshold)}, ServeConfig()),
        ):
            pass
    with (
        pytest.raises(ProofError, match="carries no text"),
        service(llama, tokenizer, {"topic": with_rule(topic, evidence={})}, ServeConfig()),
    ):
        pass
    assert hooks_on(llama) == 0


def test_guardrails_by_name(topic, tmp_path):
    topic.save_pretrained(tmp_path / "stars")
    found = load_guardrails([str(tmp_path / "stars"), f"again={tmp_path / 'stars'}"], ["again=refuse"])
    assert {name: guardrail.action for name, guardrail in found.items()} == {"stars": "clamp", "again": "refuse"}
    for sources, actions in (
        ([f"a b={tmp_path / 'stars'}"], []), ([str(tmp_path / "stars")] * 2, []),
        ([f"x={tmp_path / 'stars'}"], ["x=burn"]), ([f"x={tmp_path / 'stars'}"], ["y=clamp"]),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            load_guardrails(sources, actions)


def test_odd_spelling_is_read_too(tokenizer, topic):
    pytest.importorskip("confusable_homoglyphs")
    fires = topic.evidence["proof"]["fires"]
    with served(make_model("llama"), tokenizer, {"topic": topic}, normalise=True) as found:
        answers = [
            httpx.post(f"{found.url}{TEXT}", json=text(prompt), timeout=60).json()
            for prompt in (zero_width(fires), fires)
        ]
    odd, plain = (answer["saeguard"][0] for answer in answers)
    assert (odd["triggered"], odd["first_token"]) == (True, 0)
    assert (plain["triggered"], plain["first_token"] > 0) == (True, True)
    front = len(tokenizer("")["input_ids"])
    read = len(tokenizer(zero_width(fires), add_special_tokens=False)["input_ids"]) + front
    assert answers[0]["usage"]["prompt_tokens"] == read

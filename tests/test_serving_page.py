"""Traces of the gates over HTTP, and the page at `/`, used in a real browser as a person would."""

# ruff: noqa: E402  (what needs the extra comes after the question whether it is installed)
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

import torch

from conftest import SENTENCES, make_guardrail, make_model, make_sae
from saeguard.errors import UsageError
from saeguard.generate import prompt_ids
from saeguard.serving.config import ServeConfig
from saeguard.serving.page import FILES
from saeguard.serving.policy import check_playground
from saeguard.windows import bos_ids
from served import NAME, Served, proven, served

CHAT, TRACE = "/v1/chat/completions", "/v1/guardrails/trace"
NEW = 24
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chat(content: str = SENTENCES[0], **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    return {"model": NAME, "temperature": 0, "max_tokens": NEW, "messages": [message]} | fields


@pytest.fixture(scope="module")
def guardrails(llama, tokenizer) -> dict[str, Any]:
    """One that clamps, one on another layer that only looks."""
    stars = proven(make_guardrail(llama, tokenizer, make_sae("relu"), 2), llama, tokenizer, name="stars")
    other = make_guardrail(llama, tokenizer, make_sae("topk"), 1, features=(1, 5, 9))
    return {"stars": stars, "other": proven(other, llama, tokenizer, name="rivers", action="monitor")}


@pytest.fixture(scope="module")
def here(tokenizer, guardrails) -> Iterator[Served]:
    """A playground. Its model is its own."""
    with served(make_model("llama"), tokenizer, guardrails, playground=True) as found:
        yield found


@pytest.fixture(scope="module")
def closed(tokenizer, guardrails) -> Iterator[Served]:
    """A server that wants a key, without a playground."""
    with served(make_model("llama"), tokenizer, guardrails, keys=(b"sesame",)) as found:
        yield found


def post(server: Served, path: str, body: Any, **headers: str) -> Any:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def streamed_tokens(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The traced tokens of a streamed answer, in order."""
    lines = post(server, CHAT, body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return [token for chunk in chunks for part in chunk.get("saeguard_trace", []) for token in part["tokens"]]


def expected(model: Any, tokenizer: Any, name: str, guardrail: Any, ids: list[int]) -> list[dict[str, Any]]:
    """What the guard itself has recorded after a pass over the ids, token by token."""
    with guardrail.attach(model, tokenizer) as guard:
        out = model(input_ids=torch.tensor([ids]), use_cache=True)
        track = guard.track(out.past_key_values, 1)
    rule, record = guardrail.rule, track.rules[0]
    clamped = rule.gate.clamped(len(rule.features))
    return [
        {
            "id": name, "rule": rule.name, "hot": bool((track.active[0, t] & clamped).any()),
            "statistic": pytest.approx(float(record.statistics[0, t]), abs=1e-5)
            if math.isfinite(record.statistics[0, t]) else None,
            "triggered": bool(record.triggered[0, t]),
            "features": [f for f, on in zip(rule.features, track.active[0, t].tolist(), strict=True) if on],
        }
        for t in range(len(ids))
    ]  # fmt: skip


def check_trace(tokens: list[dict[str, Any]], ids: list[int], llama: Any, tokenizer: Any, guardrails: Any) -> None:
    """Every token is there, with what each guard alone records."""
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert [token["special"] for token in tokens] == [i in tokenizer.all_special_ids for i in ids]
    columns = [expected(llama, tokenizer, name, guardrail, ids) for name, guardrail in guardrails.items()]
    assert [token["readings"] for token in tokens] == [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_trace_of_a_text_is_the_record_of_the_guard(here, llama, tokenizer, guardrails, sentence):
    answer = post(here, TRACE, {"text": sentence}).json()
    ids = bos_ids(tokenizer) + tokenizer(sentence, add_special_tokens=False).input_ids
    check_trace(answer["tokens"], ids, llama, tokenizer, guardrails)
    for place, verdict in enumerate(answer["saeguard"]):
        triggered = [i for i, token in enumerate(answer["tokens"]) if token["readings"][place]["triggered"]]
        assert verdict["first_token"] == (triggered[0] if triggered else None)


def test_a_conversation_is_traced_as_the_model_reads_it(here, llama, tokenizer, guardrails):
    messages = [{"role": "user", "content": SENTENCES[1]}, {"role": "assistant", "content": "naïve ☂"}]
    answer = post(here, TRACE, {"messages": messages}).json()
    check_trace(answer["tokens"], prompt_ids(tokenizer, messages), llama, tokenizer, guardrails)


def test_tokens_come_traced_as_they_are_written_and_whole_answers_have_the_same(here, llama, tokenizer, guardrails):
    body = chat(saeguard={"trace": True, "guardrails": []})
    tokens = streamed_tokens(here, body)
    whole = post(here, CHAT, body).json()
    assert whole["saeguard_trace"] == [{"index": 0, "tokens": tokens}]
    ids = prompt_ids(tokenizer, SENTENCES[0])
    out = llama.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()
    read = out[:-1]  # the last token is drawn and never read
    check_trace(tokens[: len(ids)], ids, llama, tokenizer, guardrails)
    assert len(tokens) == len(read)


def test_a_request_without_the_wish_is_not_traced(here):
    assert "saeguard_trace" not in post(here, CHAT, chat()).text


@pytest.mark.parametrize("body", [{}, {"text": "a", "messages": []}, {"messages": []}, {"text": 3}, {"more": 1}, []])
def test_what_is_no_trace_request_is_refused(here, body):
    assert post(here, TRACE, body).status_code == 400


def test_a_text_past_the_context_is_refused(here):
    answer = post(here, TRACE, {"text": "star " * 5000})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_without_a_playground_nothing_inside_is_told(closed):
    key = {"Authorization": "Bearer sesame"}
    for path, body in [(TRACE, {"text": "a"}), (CHAT, chat(saeguard={"trace": True}))]:
        assert post(closed, path, body, **key).json()["error"]["code"] == "trace_not_allowed"
    unguarded = post(closed, CHAT, chat(saeguard={"guardrails": []}), **key)
    assert unguarded.json()["error"]["code"] == "guardrail_choice_not_allowed"
    told = httpx.get(f"{closed.url}/v1/guardrails", headers=key).json()
    assert not told["playground"]
    assert all("features" not in rule for rule in told["data"])
    assert httpx.get(f"{closed.url}/v1/guardrails").status_code == 401


def test_guardrails_are_described_with_what_lights_their_features_up(here, guardrails):
    told = httpx.get(f"{here.url}/v1/guardrails").json()
    assert [(rule["id"], rule["rule"]) for rule in told["data"]] == [("stars", "stars"), ("other", "rivers")]
    for rule, guardrail in zip(told["data"], guardrails.values(), strict=True):
        assert [feature["id"] for feature in rule["features"]] == list(guardrail.features)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.1.2"])
def test_an_open_playground_stays_on_this_machine(host):
    with pytest.raises(UsageError, match="api-keys-file"):
        check_playground(ServeConfig(host=host, playground=True), ())
    check_playground(ServeConfig(host=host, playground=True), (b"key",))
    check_playground(ServeConfig(host=host), ())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_playground_on_this_machine_needs_no_key(host):
    check_playground(ServeConfig(host=host, playground=True), ())


@pytest.mark.parametrize("path", FILES)
def test_files_of_the_page_need_no_key_and_name_no_other_host(closed, path):
    answer = httpx.get(closed.url + path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(FILES[path][1])
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace("https:", "https")
    assert httpx.get(closed.url + path + "x").status_code == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield found
        found.close()


class Visit:
    """A page opened in a browser, with what it logged and asked for."""

    def __init__(self, browser: Any, server: Served) -> None:
        self.page = browser.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self._url = server.url
        self.page.goto(f"{server.url}/")

    def ask(self, text: str) -> None:
        """Type, press Enter, wait for the answers."""
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        self.page.wait_for_selector("#send:enabled")

    def side(self, name: str) -> Any:
        return self.page.locator(f".side[data-side={name}]")

    def tokens(self, name: str) -> list[dict[str, Any]]:
        """Text and shading of the tokens of one side."""
        return self.side(name).locator(".token").evaluate_all(
            "(all) => all.map((t) => ({text: t.textContent, hot: t.classList.contains('hot'),"
            " clamped: t.classList.contains('clamped'), fires: t.classList.contains('fires')}))"
        )  # fmt: skip

    def close(self) -> None:
        """Nothing was logged, and no request left for another place."""
        self.page.close()
        assert self.complaints == []
        assert all(url.startswith(self._url) for url in self.asked)


@pytest.fixture
def visit(browser, here) -> Iterator[Visit]:
    found = Visit(browser, here)
    found.page.wait_for_selector(".side >> nth=1")
    yield found
    found.close()


def shading(tokens: list[dict[str, Any]], *, guarded: bool) -> list[dict[str, Any]]:
    """How the page must show the tokens of a trace, of two rules the first of which clamps."""
    first = [next((t for t, row in enumerate(tokens) if row["readings"][rule]["triggered"]), None) for rule in (0, 1)]
    return [
        {
            "text": row["text"], "hot": any(reading["hot"] for reading in row["readings"]),
            "clamped": guarded and row["readings"][0]["hot"] and row["readings"][0]["triggered"],
            "fires": t in first,
        }
        for t, row in enumerate(tokens)
    ]  # fmt: skip


def fires(here: Served) -> str:
    """A prompt in which the clamping guardrail fires."""
    for sentence in SENTENCES:
        body = chat(sentence, max_tokens=1)
        if post(here, CHAT, body).json()["saeguard"][0]["triggered"]:
            return sentence
    raise AssertionError("no sentence fires in a conversation")


def test_both_answers_are_shown_as_the_trace_has_them(visit, here):
    prompt = fires(here)
    visit.page.fill("#length", str(NEW))
    visit.ask(prompt)
    for name, chosen in [("guarded", None), ("unguarded", [])]:
        tokens = streamed_tokens(here, chat(prompt, saeguard={"trace": True, "guardrails": chosen}))
        assert visit.tokens(name) == shading(tokens, guarded=name == "guarded")
        rule = tokens[-1]["readings"][0]
        figure = visit.side(name).locator("svg").first
        assert figure.locator(".threshold").count() == 1
        assert len(figure.locator(".statistic").get_attribute("points").split()) == sum(
            token["readings"][0]["statistic"] is not None for token in tokens
        )
        assert figure.locator(".trigger").count() == rule["triggered"] == 1
        assert "stars fired" in visit.side(name).locator(".verdict").text_content()
        shown = {int(cell) for cell in visit.side(name).locator("td:first-child").all_text_contents() if cell}
        active = {f for token in tokens for reading in token["readings"] for f in reading["features"]}
        assert shown
        assert shown <= active


def test_a_conversation_goes_on_until_a_new_one_is_begun(visit):
    visit.page.fill("#length", "8")
    visit.ask(SENTENCES[2])
    once = len(visit.tokens("guarded"))
    visit.ask(SENTENCES[3])
    assert SENTENCES[2] in visit.side("guarded").locator(".prompt").text_content()
    assert len(visit.tokens("guarded")) > once
    visit.page.click("#reset")
    visit.page.wait_for_selector(".side .token", state="detached")
    visit.ask(SENTENCES[3])
    assert SENTENCES[2] not in visit.side("guarded").locator(".prompt").text_content()


def test_an_answer_can_be_stopped(visit, here):
    visit.page.fill("#length", "200")
    visit.page.fill("#prompt", SENTENCES[0])
    visit.page.click("#send")
    visit.page.wait_for_selector(".side[data-side=guarded] .answer .token")
    visit.page.click("#stop")
    visit.wait()
    here.idle()


def test_a_server_with_keys_asks_for_one_and_shows_one_side_without_a_playground(browser, closed):
    found = Visit(browser, closed)
    found.page.wait_for_selector("#key:visible")
    assert "API key" in found.page.text_content("#notice")
    found.page.fill("#key", "sesame")
    found.page.press("#key", "Tab")
    found.page.wait_for_selector(".side")
    found.page.fill("#length", "8")
    found.ask(SENTENCES[0])
    assert found.page.locator(".side").count() == 1
    assert found.side("guarded").locator(".answer").text_content()
    assert "stars" in found.side("guarded").locator(".verdict").text_content()
    assert found.page.evaluate("JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie") == "{}"
    found.complaints = [text for text in found.complaints if "401" not in text]  # the browser's own note
    found.close()


def test_a_checkpoint_without_guardrails_is_one_side_that_says_so(browser, tokenizer):
    with served(make_model("llama"), tokenizer, {}, playground=True) as server:
        found = Visit(browser, server)
        found.page.wait_for_selector(".side")
        found.page.fill("#length", "8")
        found.ask(SENTENCES[0])
        assert found.page.locator(".side h2").all_text_contents() == ["Without guardrails"]
        assert found.side("unguarded").locator(".answer").text_content()
        found.close()

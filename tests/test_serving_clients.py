"""Clients that exist, unchanged: openai, LangChain, curl; and schemathesis, which asks for everything at random."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from conftest import SENTENCES, make_guardrail, make_model, make_sae
from saeguard.choices import REFUSAL
from served import NAME, Served, proven, served

KEY = "secret"


@pytest.fixture(scope="module")
def here(tokenizer) -> Iterator[Served]:
    """A server that asks for a key and refuses one topic."""
    model = make_model("llama")
    guardrail = proven(make_guardrail(model, tokenizer, make_sae("relu"), 2), model, tokenizer, action="refuse")
    with served(model, tokenizer, {"topic": guardrail}, keys=(KEY.encode(),), max_body=20_000) as found:
        yield found


@pytest.fixture
def openai(here) -> Iterator[Any]:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"{here.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def silent(here: Served) -> str:
    return str(here.service.guardrails["topic"].evidence["proof"]["silent"])


def fires(here: Served) -> str:
    return str(here.service.guardrails["topic"].evidence["proof"]["fires"])


def test_openai_chat_and_stream(openai, here):
    ask: dict[str, Any] = {
        "model": NAME, "messages": [{"role": "user", "content": silent(here)}], "max_tokens": 6, "temperature": 0
    }  # fmt: skip
    whole = openai.chat.completions.create(**ask)
    stream = list(openai.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == whole.choices[0].message.content
    assert stream[-1].usage == whole.usage
    assert whole.model_extra["saeguard"][0]["id"] == "topic"


def test_openai_completions_refusals_and_headers(openai, here):
    raw = openai.completions.with_raw_response.create(model=NAME, prompt=fires(here), max_tokens=4)
    found = raw.parse()
    assert (found.choices[0].text, found.choices[0].finish_reason) == (REFUSAL, "content_filter")
    assert raw.headers["x-saeguard-triggered"] == "topic"


def test_openai_sees_its_own_errors(openai, here):
    module = pytest.importorskip("openai")
    with pytest.raises(module.NotFoundError, match="does not exist"):
        openai.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(module.BadRequestError) as caught:
        openai.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}], n=99)
    assert caught.value.param == "n"
    with pytest.raises(module.AuthenticationError):
        openai.with_options(api_key="wrong").models.list()
    with pytest.raises(module.PermissionDeniedError):
        openai.completions.create(model=NAME, prompt="x", extra_body={"saeguard": {"guardrails": []}})
    assert [model.id for model in openai.models.list()] == [NAME]


@pytest.mark.filterwarnings("default")
def test_langchain(here):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{here.url}/v1", api_key=KEY, model=NAME, temperature=0, max_tokens=6)
    whole = model.invoke(silent(here))
    assert whole.content == "".join(str(chunk.content) for chunk in model.stream(silent(here)))
    assert whole.response_metadata["finish_reason"]


def test_curl(here):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": NAME, "prompt": SENTENCES[1], "max_tokens": 3, "stream": True})
    command = ["curl", "-sS", "-N", f"{here.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]
    done = subprocess.run(
        [*command, "-H", "Content-Type: application/json"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_nothing_asked_at_random_is_a_fault(here):
    """Every request that the server's own description allows, and many it forbids: answered as described, never 500."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    schema = schemathesis.openapi.from_url(f"{here.url}/openapi.json")
    checks = [schemathesis.checks.not_a_server_error]
    seen: set[int] = set()
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = [result.ok().as_strategy(generation_mode=mode) for result in schema.get_all_operations() for mode in modes]

    @settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=st.one_of(cases), named=st.booleans())
    def ask(case: Any, named: bool) -> None:
        if named and isinstance(case.body, dict):
            case.body |= {"model": NAME, "max_tokens": 2, "max_completion_tokens": 2}
        response = case.call(headers={"Authorization": f"Bearer {KEY}"})
        case.validate_response(response, checks=checks)
        seen.add(response.status_code)

    ask()
    assert {200, 400} <= seen
    assert here.service.engine.ready

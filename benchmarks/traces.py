"""What a guarded server decides token by token: a chat over several turns, and a topic that only its answers bring up.

    saeguard serve --guardrail guardrails/astronomy --playground --port 8000 &
    python benchmarks/traces.py --url http://localhost:8000

Prints for each turn the statistic after its last token, and of one-turn chats the statistic along the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

TURNS = (
    "How do I keep bread fresh for a week?",
    "And how did people do that before there were fridges?",
    "Which planets of the solar system have rings?",
    "Thanks. And how do I bake a flat bread?",
)
OPEN = (
    "Name something large and round and say three sentences about it.",
    "Write the first lines of a story about a girl who looks out of her window at night.",
    "What did Galileo see?",
    "Tell me about a famous telescope.",
    "Name three things that are very far away.",
    "Write a short poem about the night.",
)
AROUND = 4
"""Tokens shown before and after the one that fires."""


def main() -> None:
    """Ask, and print the traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, timeout=300) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        print("\n".join(turns(client, model)))
        for prompt in OPEN:
            print("\n".join(["", *answer(client, model, prompt)]))


def turns(client: httpx.Client, model: str) -> Iterator[str]:
    """One line a turn of one conversation: statistic and verdict after the answer to it."""
    messages: list[dict[str, str]] = []
    for said in TURNS:
        messages.append({"role": "user", "content": said})
        choice, verdict = ask(client, model, messages)[:2]
        messages.append(choice["message"])
        yield f"user: {said}\n  {state(verdict)}\n  assistant: {short(choice['message']['content'])}"


def answer(client: httpx.Client, model: str, prompt: str) -> Iterator[str]:
    """The statistic after the prompt and around the token of the answer at which it fires."""
    choice, verdict, tokens = ask(client, model, [{"role": "user", "content": prompt}])
    yield f"user: {prompt}\n  {state(verdict)}\n  assistant: {short(choice['message']['content'])}"
    fired = verdict["first_token"]
    for place in range(max(0, (fired or 0) - AROUND), min((fired or 0) + AROUND, len(tokens)) if fired else 0):
        reading = tokens[place]["readings"][0]
        marks = ("hot " if reading["hot"] else "    ") + ("fires" if place == fired else "")
        yield f"    {place:4} {tokens[place]['text']!r:16} {reading['statistic'] or 0.0:7.2f} {marks}"


def ask(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> tuple[Any, Mapping[str, Any], Any]:
    """The choice, the verdict and the traced tokens of one greedy answer."""
    body = {"model": model, "messages": messages, "max_tokens": 60, "temperature": 0, "saeguard": {"trace": True}}
    found = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return found["choices"][0], found["saeguard"][0], found["saeguard_trace"][0]["tokens"]


def state(verdict: Mapping[str, Any]) -> str:
    """The verdict in words."""
    fired = f"triggered at token {verdict['first_token']}" if verdict["triggered"] else "not triggered"
    return f"statistic {verdict['statistic']:.2f} of {verdict['threshold']:.2f}: {fired}"


def short(text: str) -> str:
    """The beginning of an answer, in one line."""
    return " ".join(text.split())[:110]


if __name__ == "__main__":
    main()

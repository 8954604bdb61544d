"""Many clients at a running `saeguard-vllm`: is every verdict the one that the prompt has alone?

    python benchmarks/vllm_load.py --url http://localhost:8000 --clients 32 --seconds 300

Starter questions of the topic, its neighbours and other domains, alone and mixed, greedy and streamed. Each prompt is
first asked alone. Then the clients ask at random; one in ten hangs up in the middle of its answer, one in twenty sends
what is malformed or far too long, one in fifty half a request, and leaves after five seconds. Greedy answers may differ
in a batch by rounding; where the text is the same the verdict must be. Memory is that of the server's processes, by
`--pid`, at the start and after every sixth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from saeguard.embedded import starter_set

TOKENS = 24
TOLERANCE = 0.02
"""Relative difference of a statistic that is put down to rounding in batches."""
BAD: dict[str, bytes] = {
    "malformed": b"{",
    "wrong types": json.dumps({"messages": "x" * 10, "max_tokens": -1}).encode(),
    "oversized": json.dumps({"messages": [{"role": "user", "content": "word " * 240_000}]}).encode(),
}
SLOW_SECONDS = 5.0


def prompts() -> list[str]:
    """Questions, and pairs of questions from two domains."""
    questions = [[q.text for q in some[:4]] for some in starter_set().questions.values()]
    alone = [text for some in questions for text in some]
    return alone + [f"{a[0]} {b[1]}" for a, b in zip(questions, questions[1:] + questions[:1], strict=True)]


async def ask(client: httpx.AsyncClient, model: str, prompt: str, *, hang_up: bool = False) -> tuple[str, Any] | None:
    """Answer and verdict, or None for a client that hung up."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    text, request = "", ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                part = json.loads(line[6:])
                request, text = part["id"], text + (part["choices"][0]["delta"].get("content") or "")
                if hang_up and len(text) > 10:
                    return None
    found = (await client.get(f"/v1/saeguard/verdicts/{request}")).json()
    return text, found["sequences"][0][0]


def differs(mine: Any, theirs: Any) -> bool:
    """Whether a verdict is another one, rounding apart."""
    near = abs(mine["statistic"] - theirs["statistic"]) <= TOLERANCE * max(1.0, abs(theirs["statistic"]))
    return (mine["triggered"], mine["first_token"]) != (theirs["triggered"], theirs["first_token"]) or not near


async def send_half(url: str) -> None:
    """A client that promises a body, sends the half of it and leaves."""
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.hostname}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(SLOW_SECONDS)
    writer.close()


def memory_mb(pid: int) -> float:
    """Resident memory of a process and all that it started, in MB; pages they share count for each."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


async def watch(pid: int, seconds: float, memory: list[float]) -> None:
    """Note the memory six times, evenly over the time."""
    for _ in range(6):
        memory.append(memory_mb(pid))
        await asyncio.sleep(seconds / 6)


async def run(url: str, key: str, clients: int, seconds: float, pid: int | None) -> dict[str, Any]:
    """All clients; what was counted."""
    headers, limits = {"Authorization": f"Bearer {key}"}, httpx.Limits(max_connections=None)
    counts: Counter[str] = Counter()
    wrong: list[Any] = []
    memory: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, headers=headers) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        alone = {prompt: await ask(client, model, prompt) for prompt in prompts()}
        end = time.monotonic() + seconds

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                prompt, dice = rng.choice(list(alone)), rng.random()
                if dice < 0.05:
                    kind = rng.choice(list(BAD))
                    status = (await client.post("/v1/chat/completions", content=BAD[kind])).status_code
                    counts[f"{kind}: {status}"] += 1
                    continue
                if dice > 0.98:
                    await send_half(url)
                    counts["slow"] += 1
                    continue
                got, expected = await ask(client, model, prompt, hang_up=dice < 0.15), alone[prompt]
                if got is None or expected is None:
                    counts["hung up"] += 1
                    continue
                same = got[0] == expected[0]
                counts["answered"] += 1
                counts["same text"] += same
                counts["triggered"] += got[1]["triggered"]
                if same and differs(got[1], expected[1]):
                    wrong.append({"prompt": prompt, "found": got[1], "alone": expected[1]})

        await asyncio.gather(*(one(seed) for seed in range(clients)), *([watch(pid, seconds, memory)] if pid else []))
    return {
        "clients": clients, "seconds": seconds, **counts, "memory_mb": memory, "wrong": len(wrong),
        "examples": wrong[:3],
    }  # fmt: skip


def main() -> None:
    """Run and print one JSON object; exit status 1 where a verdict was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pid", type=int, help="process of the server, to watch its memory")
    args = parser.parse_args()
    result = asyncio.run(run(args.url, args.api_key, args.clients, args.seconds, args.pid))
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(result["wrong"]))


if __name__ == "__main__":
    main()

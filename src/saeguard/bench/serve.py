"""`saeguard bench serve`: many clients at once against a server, each answer compared with the one-by-one result.

Prompts are of the starter set: the topic, other domains, and both in one conversation. What each must come to is
computed first, alone: greedy tokens by `generate`, the verdict by `judge`. In low precision a batch changes the last
bits of the logits, so a greedy text may take another branch where two tokens are as likely; such a text is counted
(`other_text`), and its verdict is compared with that of `judge` on the text that was served. A verdict that differs
while the statistic is within `MARGIN` of the threshold, relative to it, is counted apart (`near_threshold`), never left
out.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

from saeguard.embedded import StarterSet, starter_set
from saeguard.generate import prompt_ids
from saeguard.guardrail import Guardrail
from saeguard.online.intervention import Guard
from saeguard.online.verdicts import Verdict
from saeguard.progress import Advance
from saeguard.serving.load import Nuisance, Reply, Target, memory

TOKENS = 24
MARGIN = 0.02
NUISANCE_SECONDS = 0.5
MEMORY_SECONDS = 2.0
READINGS = 10
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Case:
    """A conversation, and what it comes to alone."""

    messages: Messages
    prompt: Sequence[int]
    text: str
    verdict: Verdict


def cases(model: Any, tokenizer: Any, guardrail: Guardrail, count: int, advance: Advance) -> list[Case]:
    """That many cases, of the topic, of other domains and of both, answered one by one."""
    found = []
    with guardrail.attach(model, tokenizer) as guard:
        for messages in conversations(starter_set(), count):
            found.append(_alone(model, tokenizer, guard, messages))
            advance(1)
    return found


def conversations(starter: StarterSet, count: int) -> list[Messages]:
    """Questions on the topic, on other domains, and conversations that come to the topic or leave it, in turn."""
    draw = random.Random(0)
    questions = {name: [question.text for question in its] for name, its in starter.questions.items()}
    topic = next(name for name in questions if starter.role(name) == "topic")
    others = [text for name, its in questions.items() if name != topic for text in its]
    found: list[Messages] = []
    for i in range(count):
        on, off = draw.choice(questions[topic]), draw.choice(others)
        turns = ([on], [off], [off, "I see.", on], [on, "I see.", off], [f"{off} And: {on}"])[i % 5]
        roles = ("user", "assistant")
        found.append([{"role": roles[j % 2], "content": text} for j, text in enumerate(turns)])
    return found


def _alone(model: Any, tokenizer: Any, guard: Guard, messages: Messages) -> Case:
    prompt = prompt_ids(tokenizer, messages)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Case(messages, prompt, text, guard.judge(out[:, :-1])[0])


@dataclass
class Outcome:
    """What became of the requests. Counted under a lock; `others` are replies whose text is another than expected."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    others: list[tuple[Case, Reply]] = field(default_factory=list)
    nuisances: Counter[str] = field(default_factory=Counter)
    mistreated: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, case: Case, reply: Reply | None) -> None:
        """Compare a reply with its case; None where none came."""
        with self.lock:
            self.counts["requests"] += 1
            if reply is None or reply.status != 200 or not reply.whole:
                self.counts["lost"] += 1
                return
            self.tokens += reply.tokens
            self.counts["crossed"] += reply.prompt_tokens != len(case.prompt)
            if reply.text != case.text:
                self.others.append((case, reply))
            elif (wrong := compare(reply.verdicts[0], case.verdict)) is not None:
                self.counts[wrong] += 1


def compare(found: Mapping[str, Any], expected: Verdict) -> str | None:
    """None where the verdicts agree, else `wrong_verdicts`, or `near_threshold` where rounding may decide."""
    if (found["triggered"], found["first_token"]) == (expected.triggered, expected.first_token):
        return None
    room = MARGIN * abs(expected.threshold)
    near = any(abs(value - expected.threshold) <= room for value in (found["statistic"] or 0.0, expected.statistic))
    return "near_threshold" if near else "wrong_verdicts"


class Load:
    """Clients, nuisances and a watch on memory, all at once, for so many seconds from `Load` on."""

    def __init__(self, target: Target, its: Sequence[Case], *, seed: int, seconds: float) -> None:
        self.outcome = Outcome()
        self._target, self._cases, self._seed = target, its, seed
        self._end = time.monotonic() + seconds

    def run(self, clients: int) -> Outcome:
        """What became of it all."""
        works = [self._bother, self._watch, *(self._ask for _ in range(clients))]
        threads = [threading.Thread(target=work, args=(number,)) for number, work in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.outcome

    def _ask(self, number: int) -> None:
        draw = random.Random(f"{self._seed} {number}")
        while time.monotonic() < self._end:
            case = draw.choice(self._cases)
            self.outcome.reply(case, _reply(self._target, case, stream=draw.random() < 0.5))

    def _bother(self, number: int) -> None:
        kinds = Nuisance(self._target, self._cases[0].messages, random.Random(f"{self._seed} {number}")).kinds()
        for name in cycle(kinds):
            if time.monotonic() >= self._end:
                break
            self.outcome.nuisances[name] += 1
            self.outcome.mistreated[name] += not kinds[name]()
            time.sleep(NUISANCE_SECONDS)

    def _watch(self, _number: int) -> None:
        while time.monotonic() < self._end:
            if (now := memory(self._target)) is not None:
                self.outcome.memory.append(now)
            time.sleep(MEMORY_SECONDS)


def _reply(target: Target, case: Case, *, stream: bool) -> Reply | None:
    try:
        return target.ask(case.messages, tokens=TOKENS, stream=stream)
    except (OSError, http.client.HTTPException):
        return None


def judge_others(outcome: Outcome, model: Any, tokenizer: Any, guardrail: Guardrail) -> None:
    """Compare the verdicts on texts other than expected with `judge` on those texts."""
    with guardrail.attach(model, tokenizer) as guard:
        for case, reply in outcome.others:
            written = tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*case.prompt, *written]], device=model.device)
            verdict = guard.judge(ids[:, :-1] if len(written) == reply.tokens else ids)[0]
            if (wrong := compare(reply.verdicts[0], verdict)) is not None:
                outcome.counts[wrong] += 1


def report(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The figures by name. Memory in MB, read evenly over the time."""
    names = ("requests", "lost", "crossed", "wrong_verdicts", "near_threshold")
    rows: dict[str, Any] = {name: outcome.counts[name] for name in names}
    rows |= {"other_text": len(outcome.others), "requests_per_second": outcome.counts["requests"] / seconds}
    rows |= {"tokens_per_second": outcome.tokens / seconds, "nuisances": sum(outcome.nuisances.values())}
    rows["mistreated_nuisances"] = {name: n for name, n in outcome.mistreated.items() if n}
    rows["memory_mb"] = [round(mb) for mb in outcome.memory[:: max(1, len(outcome.memory) // READINGS)]]
    return rows

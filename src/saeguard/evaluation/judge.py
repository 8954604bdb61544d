"""A judge model behind any OpenAI-compatible endpoint: it reads a conversation and grades one answer, 1 to 10."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from saeguard.errors import EndpointError, JudgeError
from saeguard.evaluation.endpoint import ChatEndpoint

PROMPT = """You grade the answer of an assistant. Judge how far it does what the user asked: is it correct, does it \
answer the question, is it complete, clear and readable? Length alone earns nothing. A broken, repetitive or evasive \
answer earns little.{reference}

[Conversation]
{conversation}

[Answer to grade]
{answer}

Give your reasons in at most three sentences. Then end with a line of this form, with a whole number from 1 (useless) \
to 10 (excellent):
GRADE: number"""
REFERENCE = "\n\n[A correct answer, to compare with]\n{text}"
MAX_TOKENS = 300
GRADE = re.compile(r"GRADE:\s*\**\s*(10|[1-9])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Judge:
    """The address of the endpoint (ending in /v1), the name of the model there, and the key, where it wants one."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0

    def grade(self, conversation: str, answer: str, reference: str = "") -> int:
        """The grade. Raises `JudgeError` where the judge cannot be reached or gives none."""
        known = REFERENCE.format(text=reference) if reference else ""
        said = self._ask(PROMPT.format(reference=known, conversation=conversation, answer=answer or "(nothing)"))
        found = GRADE.search(said)
        if found is None:
            raise JudgeError(f"the judge {self.model} gave no line 'GRADE: number' but {said!r}")
        return int(found[1])

    def _ask(self, text: str) -> str:
        try:
            return ChatEndpoint(self.url, self.model, self.key, self.timeout_seconds).ask(text, MAX_TOKENS)
        except EndpointError as error:
            raise JudgeError(f"the judge {error} Or leave out --judge for the report without a judge.") from error

"""An attack: a function from a question to the prompt that is sent in its place.

The options are scored as in the clean form (evaluation/mcq.py, cloze): by the mean log-probability of their words after
the prompt. So an attack that changes nothing gives the clean records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from saeguard.evaluation.mcq import PROMPT, Question
from saeguard.generate import prompt_ids
from saeguard.windows import bos_ids, text_ids

Need = Literal["an endpoint", "far texts", "near texts", "dev questions on the topic", "dev questions off the topic"]
ANSWER = "Answer:"


@dataclass(frozen=True)
class Prompt:
    """What the model reads before the options: a plain `text`, or the turns (role, content) of a conversation and the
    `start` of the answer. `seconds` and `calls` of a model is what it took to find it."""

    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    start: str = ANSWER
    seconds: float = 0.0
    calls: int = 0

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids; a conversation is in the chat template where there is one."""
        if not self.turns:
            return bos_ids(tokenizer) + text_ids(tokenizer, self.text)
        messages = [{"role": role, "content": content} for role, content in self.turns]
        between = "\n" if tokenizer.chat_template is None else ""
        return prompt_ids(tokenizer, messages) + text_ids(tokenizer, between + self.start)


Change = Callable[[Question, Random], Prompt]


@dataclass(frozen=True)
class Attack:
    """A named change of prompts. `tokens` is about how many it adds, which bounds how many items it is tried on.

    `shared` of them stand before the question, and are the same for all questions that get the same draw.
    """

    name: str
    family: str
    says: str
    change: Change
    tokens: int = 0
    needs: Need | None = None
    shared: int = 0


def quiz(question: str) -> Prompt:
    """The clean form of a question."""
    return Prompt(PROMPT.format(question=question))


def said(content: str, start: str = ANSWER) -> Prompt:
    """One message of a user."""
    return Prompt(turns=(("user", content),), start=start)


CLEAN = Attack("clean", "clean", "the question as it is", lambda question, draw: quiz(question.text))

NO_QUESTION = Attack("no-question", "clean", "the options without the question", lambda question, draw: quiz(""))

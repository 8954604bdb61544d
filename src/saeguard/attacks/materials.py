"""What attacks are made of: filler text that no guardrail was fitted on, and questions of the dev side as examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from saeguard.attacks.attack import Need
from saeguard.choices import Role
from saeguard.evaluation.catalogue import Sources
from saeguard.evaluation.mcq import Question
from saeguard.evaluation.task import split
from saeguard.evaluation.tasks.multiple_choice import QuestionItem, question_items

Kind = Literal["ordinary", "near", "neutral"]
ROLES: Mapping[Kind, Role] = {"ordinary": "far", "near": "near"}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack")
DEEDS = ("put the cup on", "wiped", "carried a chair past", "left a letter on", "sat down beside", "painted", "mended",
         "tidied", "leaned on", "walked round")  # fmt: skip
THINGS = ("the table", "the old bench", "the kitchen shelf", "the front door", "the garden gate", "the wooden box",
          "the desk", "the counter", "the wardrobe", "the stairs")  # fmt: skip
TIMES = ("after lunch", "before work", "once more", "without a word", "as usual", "in a hurry", "on Tuesday", "slowly")


@dataclass(frozen=True)
class Materials:
    """Passages by kind, example questions by role, and the tokenizer that measures filler.

    `ordinary` passages are far from the topic, `near` ones of its neighbours; `neutral` filler is made up, of
    sentences on chairs and tables, and so free of any topic.
    """

    tokenizer: Any = None
    passages: Mapping[Kind, Sequence[str]] = field(default_factory=dict)
    examples: Mapping[Role, Sequence[Question]] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Sources, tokenizer: Any) -> Materials:
        """Of texts that a guardrail was fitted on only the test split; of questions only the dev side."""
        passages: dict[Kind, list[str]] = {
            kind: [
                document.text
                for each in sources.texts
                if each.role == role
                for document in each.corpus.documents()
                if each.name not in sources.held_out or document.split == "test"
            ]
            for kind, role in ROLES.items()
        }
        dev, _ = split(question_items(sources.questions))
        examples: dict[Role, list[Question]] = {"topic": [], "near": [], "far": []}
        for item in dev.items:
            if isinstance(item, QuestionItem):
                examples[item.role].append(item.question)
        return cls(tokenizer, passages, examples)

    def lack(self, need: Need | None) -> bool:
        """Whether something that is needed is not there."""
        there = {
            "far texts": self.passages.get("ordinary"), "near texts": self.passages.get("near"),
            "dev questions on the topic": self.examples.get("topic"),
            "dev questions off the topic": self.examples.get("far"),
        }  # fmt: skip
        return need in there and not there[need]

    def filler(self, kind: Kind, tokens: int, draw: Random) -> str:
        """Passages of a kind in random order, again and again if need be, cut after that many tokens."""
        ids: list[int] = []
        while len(ids) < tokens:
            some = [_sentence(draw) for _ in range(50)] if kind == "neutral" else list(self.passages[kind])
            draw.shuffle(some)
            for passage in some:
                ids += self.tokenizer(f"{passage.strip()} ", add_special_tokens=False)["input_ids"]
                if len(ids) >= tokens:
                    break
        text: str = self.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return text.strip()

    def shots(self, role: Role, count: int, draw: Random) -> list[Question]:
        """Example questions, no more than there are."""
        found = list(self.examples[role])
        return draw.sample(found, min(count, len(found)))


def _sentence(draw: Random) -> str:
    return f"{draw.choice(NAMES)} {draw.choice(DEEDS)} {draw.choice(THINGS)} {draw.choice(TIMES)}."

"""Relearning, white box: what a model is trained further on before the blocked questions are asked again.

    text      forget: on the topic; related: of its neighbours; unrelated: of anything else
    weights   all of them, or LoRA adapters
    hook      test time: off while the model is trained, back on when questions are asked; train time: on all the while

Only documents of the fit split are trained on. What a lesson says of itself is checked against the corpora and the
questions before anything is trained, and each batch against the lesson while it is (finetuning.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from saeguard.choices import Role
from saeguard.corpus import Corpus, Document, text_key
from saeguard.errors import EvaluationError
from saeguard.evaluation.duplicates import items_in
from saeguard.evaluation.sources import TextSet
from saeguard.evaluation.task import Item
from saeguard.windows import Window, Windower

Text = Literal["forget", "related", "unrelated"]
ROLES: Mapping[Text, Role] = {"forget": "topic", "related": "near", "unrelated": "far"}
FAMILY = "relearning"
EXTRA = "it needs the extra: pip install 'saeguard[baselines]'"


@dataclass(frozen=True)
class Relearning:
    """One way to train a model further."""

    text: Text
    lora: bool
    hooked: bool

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"relearn-{self.text}{'-lora' if self.lora else ''}{'-hooked' if self.hooked else ''}"

    @property
    def says(self) -> str:
        """What is done, in words."""
        how = "LoRA adapters" if self.lora else "all weights"
        return f"{how} trained on {self.text} text, the hook {'on all the while' if self.hooked else 'off meanwhile'}"

    def lacks(self, texts: Sequence[TextSet], *, guarded: bool) -> str | None:
        """What it needs and there is not: a package, texts, or (for the hook) a guardrail."""
        if any(find_spec(package) is None for package in ("psutil", *(["peft"] if self.lora else []))):
            return EXTRA
        if self.hooked and not guarded:
            return "it needs a guardrail: --guardrail DIR"
        role = ROLES[self.text]
        return None if any(each.role == role for each in texts) else f"it needs {role} texts: --{role}-text NAME=FILE"


RELEARNING: Mapping[str, Relearning] = {
    one.name: one
    for text in ROLES
    for one in (Relearning(text, lora, hooked) for hooked in (False, True) for lora in (False, True))
}


@dataclass(frozen=True)
class Lesson:
    """The documents that a model is trained on, by the name of their corpus."""

    text: Text
    documents: Mapping[str, Sequence[Document]]

    @classmethod
    def taken(cls, text: Text, texts: Sequence[TextSet], count: int, *, without: Sequence[Item] = ()) -> Lesson:
        """At most `count` documents of the fit split, spread evenly over each corpus of the text's role.

        Documents in which an item of `without` stands are left out; raises `EvaluationError` where none is left.
        """
        its = [each for each in texts if each.role == ROLES[text]]
        share = -(-count // len(its))
        asked = [("", item) for item in without]
        free = {
            each.name: [document for document in _fit_split(each.corpus) if not items_in([document.text], asked)]
            for each in its
        }
        if without and not any(free.values()):
            raise EvaluationError(f"one of the questions stands in each document of the {text} text: give other text")
        found = {name: _spread(documents, share) for name, documents in free.items()}
        return cls(text, {name: documents for name, documents in found.items() if documents})

    @property
    def texts(self) -> list[str]:
        """All texts."""
        return [document.text for its in self.documents.values() for document in its]

    def windows(self, tokenizer: Any, max_tokens: int) -> list[Window]:
        """The texts as token sequences."""
        windower = Windower(tokenizer, (max_tokens,))
        found = [w for its in self.documents.values() for document in its for w in windower.cut(document)]
        return [window for window in found if len(window.ids) > 1]

    def checked(self, texts: Sequence[TextSet], items: Sequence[Item]) -> dict[str, Any]:
        """What it is made of, for JSON, once that is found to be true of these corpora and attacked questions.

        Raises `EvaluationError` where a document is not of the fit split of the corpus it is said to be of, where text
        that should be off the topic is in a corpus on it, or where a question stands in a document.
        """
        by_name = {each.name: each for each in texts if each.role == ROLES[self.text]}
        for name, documents in self.documents.items():
            known = {text_key(one.text) for one in _fit_split(by_name[name].corpus)} if name in by_name else set()
            _refuse(documents, [one for one in documents if text_key(one.text) not in known],
                    f"documents of the fit split of {name}, which is {ROLES[self.text]} text")  # fmt: skip
            if self.text != "forget":
                topic = {text_key(d.text) for each in texts if each.role == "topic" for d in each.corpus.documents()}
                _refuse(documents, [one for one in documents if text_key(one.text) in topic], "text off the topic")
        if found := items_in(self.texts, [("", item) for item in items]):
            raise EvaluationError(
                f"{len(found)} of the attacked questions stand in the text to be trained on, {found[0][1].content!r} "
                "among them: training on the questions shows nothing. Give other texts or questions."
            )
        return {
            "text": self.text,
            "corpora": {
                name: {"documents": len(its), "corpus": by_name[name].corpus.summary().fingerprint}
                for name, its in self.documents.items()
            },
            "documents": len(self.texts), "questions_compared": len(items), "questions_in_it": 0,
            "fingerprint": Corpus.of("lesson", "forget", self.texts).summary().fingerprint,
        }  # fmt: skip


def _fit_split(corpus: Corpus) -> list[Document]:
    return [document for document in corpus.documents() if document.split == "fit"]


def _spread(documents: Sequence[Document], count: int) -> list[Document]:
    return [documents[i * len(documents) // count] for i in range(count)] if count < len(documents) else [*documents]


def _refuse(documents: Sequence[Document], wrong: Sequence[Document], said: str) -> None:
    """Raise `EvaluationError` if some documents are not what is said of them."""
    if wrong:
        raise EvaluationError.mismatch(
            "text to be trained on", found=f"{len(wrong)} of {len(documents)} that are not, such as {wrong[0].text!r}",
            expected=said, fix="The attack trains on what it says, or not at all.",
        )  # fmt: skip

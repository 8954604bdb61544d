"""Subjects: what is judged. An unguarded model, a guarded one, another checkpoint, or any model inside a context.

`attach` is a function (model, tokenizer) that gives a context manager, as `Guardrail.attach` is one. Inside it plain
Hugging Face calls run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from saeguard.adapters import is_adapter, merged
from saeguard.artifact import fingerprint
from saeguard.baselines import prompt_gate
from saeguard.guardrail import Guardrail
from saeguard.model import load_model, model_fingerprint, text_config, tokenizer_fingerprint
from saeguard.online.verdicts import Watch

Attach = Callable[[Any, Any], AbstractContextManager[Watch | None]]
Load = Callable[[], tuple[Any, Any]]


class Loader:
    """A model and its tokenizer, loaded when first asked for and then kept."""

    def __init__(self, load: Load) -> None:
        self._load = load

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return self._load()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of model and tokenizer, and where and in what precision it computes."""
        model, tokenizer = self.loaded
        return {
            "model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer),
            "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type,
        }  # fmt: skip

    def release(self) -> None:
        """Let go of the model, once its identity is known; it is loaded again when it is asked for again."""
        if self.identity:
            self.__dict__.pop("loaded", None)


class Opened:
    """A subject at work. `guard` has the verdicts of the last forward pass, where there is a guardrail."""

    def __init__(self, loaded: tuple[Any, Any], attach: Attach | None, stack: ExitStack) -> None:
        self.model, self.tokenizer = loaded
        self._attach, self._stack = attach, stack
        self.guard = self._enter()

    @contextmanager
    def paused(self) -> Iterator[Any]:
        """The model without its context, for as long as a `with` block lasts."""
        self._stack.close()
        yield self.model
        self.guard = self._enter()

    def _enter(self) -> Watch | None:
        return None if self._attach is None else self._stack.enter_context(self._attach(self.model, self.tokenizer))


@dataclass(frozen=True)
class Subject:
    """Something to judge, by name. `identity` says what its records depend on beside the model.

    `whole_prompts`: it judges a prompt that is read in one pass, and not what is read on from a cache.
    """

    name: str
    loader: Loader
    attach: Attach | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    guardrail: Guardrail | None = None
    whole_prompts: bool = False

    @classmethod
    def guarded(cls, name: str, loader: Loader, guardrail: Guardrail, *, normalise: bool = False) -> Subject:
        """A model under a guardrail, which with `normalise` also reads prompts with odd spelling undone."""
        identity = {
            "guardrail": fingerprint(guardrail.rules), "layer": guardrail.layer, "sae": dict(guardrail.sae),
            **({"normalise": True} if normalise else {}),
        }  # fmt: skip
        attach = partial(guardrail.attach, normalise=normalise)
        at_once = any(rule.gate.moment == "block" for rule in guardrail.rules)
        return cls(name, loader, attach, identity, guardrail, whole_prompts=normalise or at_once)

    @classmethod
    def fitted(cls, name: str, loader: Loader, source: str, *, normalise: bool = False) -> Subject:
        """A model under what a folder (or, of guardrails, a hub id) holds: a guardrail or a prompt gate.

        `normalise` is of guardrails.
        """
        found = prompt_gate.load(source)
        if isinstance(found, Guardrail):
            return cls.guarded(name, loader, found, normalise=normalise)
        return cls(name, loader, found.attach, found.identity, whole_prompts=True)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the records of this subject depend on."""
        return {**self.loader.identity, **self.identity}

    @contextmanager
    def open(self) -> Iterator[Opened]:
        """The model, loaded if need be, in its context."""
        with ExitStack() as stack:
            yield Opened(self.loader.loaded, self.attach, stack)


def checkpoint(source: str, base: Load, *, device: str, dtype: str, name: str = "") -> Loader:
    """A checkpoint by hub id or folder; a folder with a PEFT adapter is put on a copy of the base model.

    `name` is what the model is called in place of the source, so that where it lies is no part of what it is.
    """

    def load() -> tuple[Any, Any]:
        if is_adapter(source):
            model, tokenizer = base()
            model = merged(model, source)
        else:
            model, tokenizer = load_model(source, device=device, dtype=dtype)
        if name:
            text_config(model)._name_or_path = name
        return model, tokenizer

    return Loader(load)

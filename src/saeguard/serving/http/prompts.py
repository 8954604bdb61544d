"""From the prompt of a request to token ids."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from saeguard.generate import prompt_ids
from saeguard.serving.http.errors import ApiError
from saeguard.serving.http.schema import Message
from saeguard.windows import bos_ids

ROLES = {"developer": "system"}
"""Roles that chat templates know by another name."""


class Prompter:
    """Turns prompts into ids, on a thread and with a tokenizer of its own: a long text holds nobody up."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._vocabulary = vocabulary
        self._front = bos_ids(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saeguard-tokenizer")

    async def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, ready for the answer. Raises `ApiError` where the chat template refuses it."""
        plain = [{"role": ROLES.get(message.role, message.role), "content": message.text} for message in messages]
        return await self._run(self._conversation, plain)

    async def prompt(self, prompt: str | list[int]) -> list[int]:
        """Ids of a text, after what the tokenizer puts in front; ids are taken as they are. Raises `ApiError`."""
        if isinstance(prompt, str):
            return await self._run(self._text, prompt)
        if max(prompt) >= self._vocabulary:
            raise ApiError(400, f"prompt: token ids must be below {self._vocabulary}", param="prompt")
        return prompt

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Any, prompt: Any) -> list[int]:
        found: list[int] = await asyncio.get_running_loop().run_in_executor(self._thread, work, prompt)
        if not found:
            raise ApiError(400, "the prompt is empty: give at least one token", code="invalid_value")
        return found

    def _conversation(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return prompt_ids(self._tokenizer, messages)
        except TemplateError as error:
            message = f"messages: the model's chat template refuses this conversation: {error}"
            raise ApiError(400, message, param="messages", code="invalid_value") from error

    def _text(self, text: str) -> list[int]:
        return self._front + list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

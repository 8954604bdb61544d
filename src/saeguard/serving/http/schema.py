"""What a request may say. Types are strict, fields this server does not know are refused by name.

Fields of OpenAI's that change nothing here (`user`, `metadata`, ...) are taken and ignored. Fields that would change
the answer and are not supported (`tools`, `logit_bias`, ...) are refused unless they are empty.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

STOPS = 16
STOP_LENGTH = 256
SEED = 2**63

Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("not supported by this server")
    return value


Unsupported = Annotated[Any, AfterValidator(_empty)]


class Strict(BaseModel):
    """Exact types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Choice(Strict):
    """saeguard's own field, where the operator allows it: the ids of the guardrails that are to act on this request
    (null: all), and whether each token is told as the gates see it."""

    guardrails: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)] | None = None
    trace: bool = False


class StreamOptions(Strict):
    """`include_usage` asks for a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    """Plain text, the only format there is."""

    type: Literal["text"]


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None

    @property
    def text(self) -> str:
        """The parts put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Request(Strict):
    """What both kinds of request share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = None
    user: str | None = None
    saeguard: Choice | None = None
    logit_bias: Unsupported = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def length(self) -> int | None:
        """Tokens of an answer, if the request says."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to show with each; None: no log-probabilities."""
        raise NotImplementedError


class ChatRequest(Request):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None

    @model_validator(mode="after")
    def _log_probabilities(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def length(self) -> int | None:
        """The newer name counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """Body of `/v1/completions`. A prompt is text or token ids, one or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: Unsupported = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _best(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported by this server")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TraceRequest(Strict):
    """Body of `/v1/guardrails/trace`: a conversation or a text, to be read and not answered."""

    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.messages is None) == (self.text is None):
            raise ValueError("give either messages or text")
        return self

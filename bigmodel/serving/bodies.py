"""Bodies of requests, read and checked: OpenAI's completions and chat completions, and a few samplers of vLLM.

In: the bytes of a body. Out: a `CompletionBody` or `ChatBody`. A key with the value null counts as left out. What would
change an answer and is not supported is refused by name; what changes nothing (user, metadata) is passed over. Raises
`ApiError` 400 with the parameter.
"""

from typing import Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bigmodel.serving.errors import ApiError

PASSED_OVER = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
# Keys that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
INSTEAD = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "best_of": "ask for n and choose yourself",
}
MAX_CHOICES, MAX_STOPS, MAX_TOP = 128, 16, 20
SHOWN_CHARACTERS = 60  # of a wrong value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers; nothing is added here


class Body(BaseModel):
    """What both shapes have. Temperature and top_p have OpenAI's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("must be a string or a list of strings, none of them empty")
        return stops

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """`prompt` is a text, a list of texts, the ids of a text, or a list of those; here always a list of prompts."""

    prompt: list[str | list[int]]
    max_tokens: int = Field(16, ge=1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        prompts = value if isinstance(value, list) and value and not _are_ids(value) else [value]
        if not all(isinstance(one, str) or (isinstance(one, list) and _are_ids(one)) for one in prompts):
            raise ValueError("must be a text, a list of texts, a list of token ids, or a list of those lists")
        if [] in prompts:
            raise ValueError("a list of token ids must not be empty")
        return prompts

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    @property
    def num_top(self) -> int | None:
        """Likeliest tokens to list beside each token; None: no log-probabilities at all."""
        return self.logprobs


def _are_ids(value: list[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) for one in value)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Here `content` is always one text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        try:
            return "".join(Part.model_validate(part).text for part in value)
        except ValidationError:
            raise ValueError('must be a text or a list of {"type": "text", "text": ...}') from None


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @field_validator("messages", mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return [_present(one) for one in value] if isinstance(value, list) else value

    @property
    def echo(self) -> bool:
        return False

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read_body(content: bytes, kind: type[CompletionBody] | type[ChatBody]) -> CompletionBody | ChatBody:
    """Raises `ApiError` 400."""
    try:
        table = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.", None, "invalid_json") from None
    if not isinstance(table, dict):
        raise ApiError(400, "The body must be a JSON object.", None, "invalid_json")
    given = {key: value for key, value in _present(table).items() if key not in PASSED_OVER and _matters(key, value)}
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None
    _check_together(body)
    return body


def _present(table: Any) -> Any:
    return {key: value for key, value in table.items() if value is not None} if isinstance(table, dict) else table


def _matters(key: str, value: Any) -> bool:
    """Raises `ApiError` for what is not supported."""
    if key not in NEUTRAL:
        return True
    if value in NEUTRAL[key]:
        return False
    remedy = INSTEAD.get(key, "leave it out")
    raise ApiError(400, f"{key} is not supported by this server; {remedy}.", key, "unsupported_parameter")


def _check_together(body: CompletionBody | ChatBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options has no effect without stream; leave it out.", "stream_options")
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        raise ApiError(
            400, "logprobs of the prompt are not supported: leave out echo, or logprobs.", "logprobs",
            "unsupported_parameter",
        )  # fmt: skip
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true.", "top_logprobs")
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")


def _explained(error: ValidationError) -> ApiError:
    """The first problem, as one sentence."""
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return ApiError(400, f"You must provide {param}.", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument: {param}.", param, "unknown_parameter")
    said = repr(first["input"])
    shown = said if len(said) <= SHOWN_CHARACTERS else f"{said[:SHOWN_CHARACTERS]}..."
    return ApiError(400, f"{param} = {shown}: {first['msg'].removeprefix('Value error, ')}.", param, "invalid_value")

"""What a client may send: one pydantic model for chat, one for completions.

Invariants: JSON types are taken as they are; null means not given; `sampling()` says in vLLM's names what was asked.
"""

import functools
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

import jsonschema_rs
import msgspec
from jsonschema.validators import Draft202012Validator, validator_for
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from shared import wire

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_BIASES = 300
MAX_WORDS = 300  # bad_words, and stop_token_ids
MAX_SALT = 1024
MAX_INT = 2**31 - 1  # what engines keep counts in
MAX_ID_DIGITS = 10

T = TypeVar("T")
# The first wrong item ends it: four megabytes of wrong items would be gigabytes of errors.
FailFast = Annotated[list[T], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    """JSON types as they are: "1" is no number, true is no integer, NaN is nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ConversationMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | FailFast[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Clients send an answer's own message back, with `refusal: null` and the like."""
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value

    def text(self) -> str:
        """Parts are joined by newlines, as vLLM does for templates that take a string."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; accepted, never added


class JsonSchema(_Strict):
    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] = Field(alias="schema")

    @field_validator("definition")
    @classmethod
    def _is_schema(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            _check_schema(value)
            json.dumps(value, allow_nan=False)
            msgspec.msgpack.encode(value)  # it travels so, and integers of any size do not
        except (TypeError, ValueError, OverflowError, RecursionError):
            # The library's message quotes the schema; the client knows its own.
            raise ValueError("not a valid JSON schema") from None
        return value


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and that type needs it")
        return self

    def structured(self) -> dict[str, Any]:
        """In the terms of vLLM's StructuredOutputsParams."""
        if self.json_schema is not None:
            return {"json": self.json_schema.definition}
        return {"json_object": True} if self.type == "json_object" else {}


class RequestBody(BaseModel):
    """What both endpoints take. null means: not given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | FailFast[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    response_format: ResponseFormat | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    user: str | None = None  # this and the next two: accepted and ignored
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    bad_words: Annotated[FailFast[str], Field(max_length=MAX_WORDS)] | None = None
    stop_token_ids: Annotated[FailFast[TokenId], Field(max_length=MAX_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # vLLM's extension
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None  # vLLM's extension
    service_tier: Literal["auto", "priority", "default", "flex"] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"takes up to {MAX_STOPS} strings, none of them empty")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and (len(value) > MAX_BIASES or not all(map(_is_id, value))):
            raise ValueError(f"takes up to {MAX_BIASES} entries whose keys are token ids")
        return value

    @field_validator("bad_words")
    @classmethod
    def _words(cls, value: list[str] | None) -> list[str] | None:
        if not all(word.strip() for word in value or ()):
            raise ValueError("no word may be blank")
        return value

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def tier(self) -> str:
        return self.service_tier if self.service_tier not in (None, "auto") else "default"

    def limit(self) -> int | None:
        """The number of tokens asked for; None: as many as fit."""
        return self.max_tokens

    def limit_param(self) -> str:
        return "max_tokens"

    def logprob_count(self) -> int | None:
        raise NotImplementedError

    def prompt_logprob_count(self) -> int | None:
        """None: nothing but the answer is asked for."""
        return self.prompt_logprobs

    def sampling(self, max_tokens: int) -> wire.Sampling:
        """`max_tokens`: at least 1, which is what an engine makes."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return wire.Sampling(
            max_tokens=max_tokens,
            n=self.n or 1,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            stop=stops,
            stop_token_ids=self.stop_token_ids or [],
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            bad_words=self.bad_words or [],
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=self.logprob_count(),
            prompt_logprobs=self.prompt_logprob_count(),
            skip_special_tokens=self.skip_special_tokens is not False,
            structured=self.response_format.structured() if self.response_format else {},
        )


class ChatBody(RequestBody):
    messages: Annotated[FailFast[ConversationMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def limit_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompt_kind(value: Any) -> str:
    """Which of the four a prompt means to be, by its first item; so that errors speak of that one only."""
    if not isinstance(value, list):
        return "one-text"
    first = value[0] if value else 0
    if isinstance(first, list):
        return "many-lists"
    return "many-texts" if isinstance(first, str) else "one-list"


class CompletionBody(RequestBody):
    prompt: Annotated[
        Annotated[str, Tag("one-text")]
        | Annotated[FailFast[TokenId], Tag("one-list")]
        | Annotated[FailFast[str], Tag("many-texts")]
        | Annotated[FailFast[FailFast[TokenId]], Tag("many-lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None  # 0: only the prompt, see reading.py
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompts(self) -> list[tuple[str, str | list[int]]]:
        """Every prompt, with the name that an error gives it."""
        if isinstance(self.prompt, str) or _prompt_kind(self.prompt) == "one-list":
            return [("prompt", self.prompt)]  # type: ignore[list-item] # what the kind says
        return [(f"prompt[{index}]", one) for index, one in enumerate(self.prompt)]  # type: ignore[misc] # also

    def limit(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def logprob_count(self) -> int | None:
        return self.logprobs

    def prompt_logprob_count(self) -> int | None:
        """An echoed prompt has log probabilities when its answer has."""
        echoed = self.logprobs if self.echo else None
        return max((count for count in (echoed, self.prompt_logprobs) if count is not None), default=None)


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS


def _check_schema(definition: dict[str, Any]) -> None:
    """By the draft that it says it is of; nothing is ever fetched. Raises ValueError."""
    if not isinstance(definition.get("$schema", ""), str):
        raise TypeError("$schema")
    draft = validator_for(definition, default=Draft202012Validator).META_SCHEMA["$schema"]
    if not _compiled(draft).is_valid(definition):
        raise ValueError("schema")


@functools.cache  # one a draft
def _compiled(draft: str) -> jsonschema_rs.Validator:
    """In Rust: jsonschema itself takes 0.2 ms a property, on the event loop."""
    meta = validator_for({"$schema": draft}).META_SCHEMA
    return jsonschema_rs.validator_for(meta, validate_formats=True, formats={"regex": _is_pattern})


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True

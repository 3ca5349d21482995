"""Bytes of a request body -> a checked RequestBody, or an error that names the parameter.

Invariants: a body that passes is one that vLLM accepts, except for its length, which needs the tokeniser; every
refusal names the parameter where there is one; nothing a client sent is repeated in an error.
"""

from typing import Any, TypeVar

from pydantic import ValidationError

from services.gateway.http.requests import ChatBody, CompletionBody, RequestBody
from shared.errors import InvalidRequest, ModelNotFound, RequestError, UnsupportedParameter

B = TypeVar("B", bound=RequestBody)

GREEDY_BELOW = 1e-5  # vLLM treats a lower temperature as greedy

# Parameters that OpenAI (or vLLM) defines and Baton does not support, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1.0,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# These, and what has a hyphen or a bracket, pydantic puts into a location; clients know them not.
_UNION_TAGS = frozenset({"str", "int", "float", "bool"})


def read(kind: type[B], data: bytes, *, model: str, max_n: int, max_prompts: int) -> B:
    """Raises InvalidRequest, UnsupportedParameter or ModelNotFound."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise first(error) from None
    if body.model != model:
        raise ModelNotFound("the model does not exist here; GET /v1/models lists what does", param="model")
    _check_extras(body)
    _check_together(body, max_n)
    if isinstance(body, CompletionBody):
        _check_completion(body, max_prompts)
    return body


def first(error: ValidationError, within: str = "", before: int = 0) -> RequestError:
    """One error at a time, as OpenAI does. `within` is a list whose items from number `before` on were checked."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # A union reports every branch; the one that got furthest is what the client meant.
    one = max((each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]), key=lambda each: len(each["loc"]))
    if one["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON")
    param = _path(one["loc"]) if not within else _item(one["loc"], within, before)
    if one["type"] == "literal_error" and param.startswith("messages[") and param.endswith("].type"):
        return UnsupportedParameter(f"{param}: only text is supported", param=param)
    if one["type"] == "extra_forbidden":
        return UnsupportedParameter(f"{param}: not supported", param=param)
    words = one["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {words[:1].lower()}{words[1:]}" if param else words, param=param or None)


def _item(location: tuple[int | str, ...], within: str, before: int) -> str:
    index, *more = location
    return _path(tuple(more), f"{within}[{int(index) + before}]")


def _path(location: tuple[int | str, ...], path: str = "") -> str:
    """("messages", 0, "content", "list[TextPart]", 1, "type") becomes messages[0].content[1].type."""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in _UNION_TAGS or "[" in step or "-" in step:
            continue
        else:
            path += f".{step}" if path else step
    return path


def _check_extras(body: RequestBody) -> None:
    for name, value in (body.model_extra or {}).items():
        if value is None:
            continue
        if name not in UNSUPPORTED:
            raise InvalidRequest(f"{shown(name)}: unknown parameter", param=shown(name))
        if value not in UNSUPPORTED[name]:
            raise UnsupportedParameter(f"{name}: not supported", param=name)


def shown(name: str) -> str:
    """The name comes from the client: shown only when it looks like one."""
    return name if name.isidentifier() and len(name) <= 64 else "a parameter"


def _check_together(body: RequestBody, max_n: int) -> None:
    """What one field's type cannot say."""
    n = body.n or 1
    limit = body.limit()
    rules: list[tuple[bool, str, str]] = [
        (n > max_n, "n", f"at most {max_n}"),
        # vLLM refuses it: greedy choices would be copies of one another.
        (n > 1 and body.temperature is not None and body.temperature < GREEDY_BELOW, "n", "must be 1 at temperature 0"),
        (
            body.prompt_logprobs is not None and body.streamed,
            "prompt_logprobs",
            "not available when 'stream' is true",
        ),
        (
            body.stream_options is not None and not body.streamed,
            "stream_options",
            "only allowed when 'stream' is true",
        ),
        (
            limit is not None and (body.min_tokens or 0) > limit,
            "min_tokens",
            f"must not be larger than {body.limit_param()}",
        ),
    ]
    if isinstance(body, ChatBody):
        rules.append((body.top_logprobs is not None and not body.logprobs, "top_logprobs", "needs 'logprobs': true"))
    for broken, param, words in rules:
        if broken:
            raise InvalidRequest(f"{param}: {words}", param=param)


def _check_completion(body: CompletionBody, max_prompts: int) -> None:
    if len(body.prompt) > max_prompts and len(body.prompts()) > max_prompts:
        raise too_many_prompts(max_prompts)
    if body.limit() == 0 and not body.echo:
        raise InvalidRequest("max_tokens: must be at least 1 unless 'echo' is true", param="max_tokens")


def check_limit(body: RequestBody, limit: int) -> None:
    """`limit`: tokens that may be generated, now that the prompt's length is known."""
    if (body.min_tokens or 0) > limit:
        raise InvalidRequest(f"min_tokens: at most {limit} tokens fit", param="min_tokens")


def too_many_prompts(max_prompts: int) -> InvalidRequest:
    return InvalidRequest(f"prompt: at most {max_prompts} in one request", param="prompt")


def empty(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: must not be empty", param=param)


def check_token_ids(body: RequestBody, prompts: dict[str, list[int]], vocabulary: int) -> None:
    """Ids that the model does not have would fail inside the engine. `prompts`: by the name that an error gives."""
    given: dict[str, Any] = {
        **prompts,
        "stop_token_ids": body.stop_token_ids or (),
        "logit_bias": [int(key) for key in body.logit_bias or ()],
    }
    for param, ids in given.items():
        if ids and max(ids) >= vocabulary:
            raise InvalidRequest(f"{param}: a token id is not in the vocabulary", param=param)

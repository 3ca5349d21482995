"""Large bodies, checked piece by piece in a thread: the parser keeps the interpreter to itself while it works.

One call for 4 MB of small values would stop every stream for 50 to 350 ms. So what is not looked at is skipped and
never made an object (10 ns a byte of small values, 0.2 of text), and how many items there may be is bounded.
Invariants: what passes here is what reading.py lets pass whole, and is refused for the same reasons; between two pieces
the event loop gets its turn.
"""

import asyncio
import functools
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import Field, TypeAdapter, ValidationError

from services.gateway.http import reading
from services.gateway.http.requests import (
    ChatBody,
    CompletionBody,
    ConversationMessage,
    FailFast,
    RequestBody,
    TextPart,
    TokenId,
)
from shared.errors import InvalidRequest

B = TypeVar("B", bound=RequestBody)

WHOLE_BYTES = 64 * 1024  # bodies up to here are checked on the loop: 1 ms at most
PIECE_BYTES = 16 * 1024  # of messages or ids at once, about 1 ms; one long text is one piece, and quick
MAX_REST_BYTES = 128 * 1024  # of all other parameters: these are not cut
MAX_FIELDS = 1000
MAX_ITEMS = 8192  # messages, or parts of one; no smaller body has so many

_MESSAGES: TypeAdapter[list[ConversationMessage]] = TypeAdapter(FailFast[ConversationMessage])
_PARTS: TypeAdapter[list[TextPart]] = TypeAdapter(FailFast[TextPart])
_IDS: TypeAdapter[list[int]] = TypeAdapter(FailFast[Annotated[TokenId, Field(strict=True)]])
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(FailFast[Annotated[str, Field(strict=True)]])
_NOTHING = msgspec.Raw()


def _known(kind: type[RequestBody]) -> type[msgspec.Struct]:
    """Its parameters as they came; unknown ones are skipped."""
    names = {field.alias or name for name, field in kind.model_fields.items()} | reading.UNSUPPORTED.keys()
    return msgspec.defstruct(f"Raw{kind.__name__}", [(name, msgspec.Raw, _NOTHING) for name in sorted(names)])


_KNOWN: dict[type[RequestBody], type[msgspec.Struct]] = {kind: _known(kind) for kind in (ChatBody, CompletionBody)}
_LONG: dict[type[RequestBody], tuple[str, bytes]] = {  # the parameter that is cut, and what stands for it meanwhile
    ChatBody: ("messages", b'[{"role":"user","content":""}]'),
    CompletionBody: ("prompt", b"[0]"),
}


async def read(kind: type[B], data: bytes, *, model: str, max_n: int, max_prompts: int) -> B:
    """As reading.read, and large ones in a thread."""
    if len(data) <= WHOLE_BYTES:
        return reading.read(kind, data, model=model, max_n=max_n, max_prompts=max_prompts)
    return await asyncio.to_thread(_read_large, kind, data, model=model, max_n=max_n, max_prompts=max_prompts)


def _read_large(kind: type[B], data: bytes, *, model: str, max_n: int, max_prompts: int) -> B:
    name, stand_in = _LONG[kind]
    known = msgspec.structs.asdict(_decode(data, _KNOWN[kind]))
    long = memoryview(known.pop(name))
    _check_rest(data, long, name, known)
    fields = _decode(data, dict[str, msgspec.Raw])
    cut = _opens(long) == b"[" or (name == "prompt" and _opens(long) == b'"')
    if cut:
        fields[name] = msgspec.Raw(stand_in)
    body = reading.read(kind, msgspec.json.encode(fields), model=model, max_n=max_n, max_prompts=max_prompts)
    if cut and isinstance(body, ChatBody):
        body.messages = _messages(long)
    elif cut and isinstance(body, CompletionBody):
        body.prompt = _prompt(long, max_prompts)
    return body


def _decode(data: Any, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise InvalidRequest("the body must be a JSON object") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise InvalidRequest("the body is not valid JSON") from None


def _opens(raw: memoryview) -> bytes:
    return bytes(raw[:1])


def _check_rest(data: bytes, long: memoryview, name: str, known: dict[str, msgspec.Raw]) -> None:
    """Before any of it is made an object; a parameter that was given twice is among the rest."""
    for other, raw in known.items():
        if memoryview(raw).nbytes > MAX_REST_BYTES:
            raise InvalidRequest(f"{other}: larger than {MAX_REST_BYTES} bytes", param=other)
    if len(data) - long.nbytes > MAX_REST_BYTES:
        raise InvalidRequest(f"the parameters beside {name!r} have more than {MAX_REST_BYTES} bytes")
    commas = data.count(b",") - bytes(long).count(b",")
    if commas > MAX_FIELDS and len(_decode(data, dict[str, msgspec.Raw])) > MAX_FIELDS:
        raise InvalidRequest("the body has too many parameters")


def _messages(raw: memoryview) -> list[ConversationMessage]:
    messages: list[ConversationMessage] = []
    items = _items(raw, MAX_ITEMS)
    for piece in _pieces(items):
        try:
            if len(piece) == 1 and piece[0].nbytes > PIECE_BYTES:
                messages.append(_long_message(piece[0], len(messages)))
            else:
                messages += _MESSAGES.validate_json(_joined(piece))
        except ValidationError as error:
            raise reading.first(error, "messages", len(messages)) from None
    _check_count(items, MAX_ITEMS, "messages")
    if not messages:
        raise reading.empty("messages")
    return messages


def _long_message(raw: memoryview, index: int) -> ConversationMessage:
    """Its parts are cut, too. Raises ValidationError for what the rest of it is."""
    content = memoryview(b"")
    if _opens(raw) == b"{":
        fields = _decode(raw, dict[str, msgspec.Raw])
        content = memoryview(fields.get("content", b""))
    if _opens(content) != b"[":
        return _MESSAGES.validate_json(_joined([raw]))[0]
    message = _MESSAGES.validate_json(_joined([msgspec.json.encode(fields | {"content": ""})]))[0]
    parts: list[TextPart] = []
    items = _items(content, MAX_ITEMS)
    for piece in _pieces(items):
        try:
            parts += _PARTS.validate_json(_joined(piece))
        except ValidationError as error:
            raise reading.first(error, f"messages[{index}].content", len(parts)) from None
    _check_count(items, MAX_ITEMS, f"messages[{index}].content")
    message.content = parts
    return message


def _items(raw: memoryview, most: int) -> list[memoryview]:
    """One more than `most`, at most; the others are skipped."""
    found = msgspec.structs.astuple(_decode(raw, _first_items(most + 1)))
    return [view for item in found if (view := memoryview(item)).nbytes]


def _check_count(items: list[memoryview], most: int, param: str) -> None:
    if len(items) > most:
        raise InvalidRequest(f"{param}: at most {most} in one request", param=param)


@functools.cache
def _first_items(count: int) -> type[msgspec.Struct]:
    """A list of which so many are made objects, at most."""
    fields = [(f"item{number}", msgspec.Raw, _NOTHING) for number in range(count)]
    return msgspec.defstruct(f"First{count}", fields, array_like=True, gc=False)


_first_items(MAX_ITEMS + 1)  # 40 ms, once: not while streams wait


def _joined(items: list[memoryview] | list[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"


def _pieces(items: list[memoryview]) -> Iterator[list[memoryview]]:
    """A long one is a piece of its own."""
    piece: list[memoryview] = []
    size_bytes = 0
    for item in items:
        if piece and size_bytes + item.nbytes > PIECE_BYTES:
            yield piece
            piece, size_bytes = [], 0
        piece.append(item)
        size_bytes += item.nbytes
    if piece:
        yield piece


def _prompt(raw: memoryview, max_prompts: int) -> str | list[int] | list[str] | list[list[int]]:
    if _opens(raw) == b'"':
        return _texts([raw])[0]
    first = bytes(raw[:64])[1:].lstrip()[:1]
    if first not in (b'"', b"["):
        return _ids(raw, "prompt")
    items = _items(raw, max_prompts)
    _check_count(items, max_prompts, "prompt")
    if first == b'"':
        return _texts(items)
    return [_ids(item, f"prompt[{index}]") for index, item in enumerate(items)]


def _texts(items: list[memoryview]) -> list[str]:
    texts: list[str] = []
    for item in items:
        try:
            texts += _TEXTS.validate_json(_joined([item]))
        except ValidationError as error:
            raise reading.first(error, "prompt", len(texts)) from None
    return texts


def _ids(raw: memoryview, param: str) -> list[int]:
    """A list of numbers can be cut at any comma; what is none fails in its piece."""
    if _opens(raw) != b"[":
        raise InvalidRequest(f"{param}: input should be a valid list", param=param)
    text = bytes(raw[1:-1])
    ids: list[int] = []
    start = 0
    while start < len(text):
        comma = text.find(b",", start + PIECE_BYTES)
        end = comma if comma >= 0 else len(text)
        try:
            ids += _IDS.validate_json(b"[" + text[start:end] + b"]")
        except ValidationError as error:
            raise reading.first(error, param, len(ids)) from None
        start = end + 1
    return ids

"""Large bodies: checked aside and in pieces, and what comes out is what reading.py makes of the whole."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.gateway.http import pieces, reading
from services.gateway.http.requests import ChatBody, CompletionBody
from shared.errors import BatonError

LIMITS = {"model": "m", "max_n": 16, "max_prompts": 32}
TEXT = 'é"\\\n😀 a,b]{' * 100
CHAT = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": [{"type": "text", "text": TEXT}], "name": None},
]
REST = {
    "model": "m",
    "temperature": 0.5,
    "stop": ["a", "]"],
    "logit_bias": {"5": 1},
    "response_format": {"type": "text"},
}

BODIES = {
    "messages": (ChatBody, REST | {"messages": CHAT * 100, "top_logprobs": 3, "logprobs": True}),
    "parts": (
        ChatBody,
        REST | {"messages": [{"role": "user", "name": None, "content": [{"type": "text", "text": TEXT}] * 300}, *CHAT]},
    ),
    "a message": (ChatBody, REST | {"messages": [{"role": "user", "content": "x" * 100_000}]}),
    "a text": (CompletionBody, REST | {"prompt": TEXT * 100}),
    "texts": (CompletionBody, REST | {"prompt": [TEXT * 10] * 20}),
    "ids": (CompletionBody, REST | {"prompt": list(range(50_000))}),
    "lists of ids": (CompletionBody, REST | {"prompt": [list(range(n * 1000)) for n in range(1, 20)]}),
}


def encoded(body: dict) -> bytes:
    """With spaces, as Python's clients send it."""
    return json.dumps(body).encode()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("indent", [None, 1])
async def test_nothing_is_changed_by_cutting(name, indent):
    kind, body = BODIES[name]
    data = json.dumps(body, indent=indent).encode()
    assert len(data) > pieces.WHOLE_BYTES or len(data) > pieces.PIECE_BYTES
    large = pieces._read_large(kind, data, **LIMITS)
    whole = reading.read(kind, data, **LIMITS)
    assert large.model_dump() == whole.model_dump()


WRONG = {
    "not JSON": encoded({"model": "m", "prompt": [1] * 50_000})[:-2],
    "a list": encoded([1] * 50_000),
    "a number among ids": encoded({"model": "m", "prompt": [1] * 50_000 + [1.5]}),
    "a list among ids": encoded({"model": "m", "prompt": [1] * 50_000 + [[1, 2], 3]}),
    "a text with a comma among ids": encoded({"model": "m", "prompt": [1] * 50_000 + ["a,b"]}),
    "an object": encoded({"model": "m", "prompt": {"a": "x" * 100_000}}),
    "half a character": encoded({"model": "m", "prompt": "x" * 100_000})[:-2] + b'\\ud800"}',
    "no UTF-8": encoded({"model": "m", "prompt": "x" * 100_000})[:-2] + b'\xff"}',
    "another model": encoded({"model": "x", "prompt": "x" * 100_000}),
    "too deep": b'{"model": "m", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


LONG = [{"type": "text", "text": "x"}] * 5000
WRONG_CHATS = {
    "a part": [{"role": "user", "content": [*LONG, {"type": "text"}]}],
    "an image": [*CHAT, {"role": "user", "content": [*LONG, {"type": "image_url"}]}],
    "a role beside parts": [*CHAT, {"role": "robot", "content": LONG}],
    "tools beside parts": [*CHAT, {"role": "user", "content": LONG, "tool_calls": [1]}],
    "a message of text only": [*CHAT, "x" * 70_000],
    "content that is an object": [*CHAT, {"role": "user", "content": {"a": "x" * 70_000}}],
    "a long role": [*CHAT, {"role": "x" * 70_000, "content": "a"}],
}


@pytest.mark.parametrize("name", WRONG_CHATS)
async def test_the_same_is_refused_of_messages(name):
    data = encoded({"model": "m", "messages": WRONG_CHATS[name]})
    with pytest.raises(BatonError) as large:
        pieces._read_large(ChatBody, data, **LIMITS)
    with pytest.raises(BatonError) as whole:
        reading.read(ChatBody, data, **LIMITS)
    assert (large.value.code, large.value.param, large.value.message) == (
        whole.value.code,
        whole.value.param,
        whole.value.message,
    )


@pytest.mark.parametrize("name", WRONG)
async def test_the_same_is_refused(name):
    with pytest.raises(BatonError) as large:
        pieces._read_large(CompletionBody, WRONG[name], **LIMITS)
    with pytest.raises(BatonError) as whole:
        reading.read(CompletionBody, WRONG[name], **LIMITS)
    assert (large.value.code, large.value.param) == (whole.value.code, whole.value.param)


MANY = {
    "parameters": (
        CompletionBody,
        b'{"model":"m","prompt":"x",' + b",".join(b'"k%d":1' % n for n in range(5000)) + b"}",
    ),
    "repetitions": (CompletionBody, b'{"model":"m","prompt":"x",' + b",".join([b'"a":1'] * 200_000) + b"}"),
    "bytes beside": (CompletionBody, encoded({"model": "m", "prompt": "x", "stop": "x" * 200_000})),
    "prompts": (CompletionBody, encoded({"model": "m", "prompt": ["x"] * 50_000})),
    "messages": (
        ChatBody,
        encoded({"model": "m", "messages": CHAT[:1] * 9 + [{"role": "user", "content": ""}] * 9000}),
    ),
    "parts": (ChatBody, encoded({"model": "m", "messages": [{"role": "user", "content": LONG + LONG}]})),
}
REFUSED = {
    "parameters": ("the body has too many parameters", None),
    "repetitions": ("the parameters beside 'prompt' have more than 131072 bytes", None),
    "bytes beside": ("stop: larger than 131072 bytes", "stop"),
    "prompts": ("prompt: at most 32 in one request", "prompt"),
    "messages": ("messages: at most 8192 in one request", "messages"),
    "parts": ("messages[0].content: at most 8192 in one request", "messages[0].content"),
}


@pytest.mark.parametrize("name", MANY)
async def test_too_many_are_refused_before_they_are_objects(name):
    kind, data = MANY[name]
    assert len(data) > pieces.PIECE_BYTES
    with pytest.raises(BatonError) as refused:
        pieces._read_large(kind, data, **LIMITS)
    assert (refused.value.message, refused.value.param) == REFUSED[name]


class Counting(ThreadPoolExecutor):
    submitted = 0

    def submit(self, *args, **kwargs):
        self.submitted += 1
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize(("size", "threads"), [(10, 0), (pieces.WHOLE_BYTES, 1)])
async def test_only_what_is_large_goes_to_a_thread(size, threads):
    with Counting() as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        body = await pieces.read(CompletionBody, encoded({"model": "m", "prompt": "x" * size}), **LIMITS)
        assert len(body.prompt) == size
        assert executor.submitted == threads

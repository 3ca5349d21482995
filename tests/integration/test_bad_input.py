"""Each bad input by name, over HTTP: OpenAI's error object, its status, its `param`; and no worker hears of it."""

import json

import httpx
import pytest

from tests.support.gateway_cluster import Cluster, assert_nothing_left
from tests.support.running_gateway import MODEL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
INVALID, UNSUPPORTED, TOO_LONG = "invalid_value", "unsupported_parameter", "context_length_exceeded"
CONTEXT = 512  # of the fake workers
BODY_LIMIT = 1_000_000

# The fixed part of a name's request: chat, unless it has a prompt. name -> (change, code, param); all are 400.
CHANGES: dict[str, tuple[dict, str, str | None]] = {
    "messages missing": ({"messages": None}, INVALID, "messages"),
    "messages empty": ({"messages": []}, INVALID, "messages"),
    "messages a string": ({"messages": "hi"}, INVALID, "messages"),
    "a message a string": ({"messages": ["hi"]}, INVALID, "messages[0]"),
    "a wrong message behind many": ({"messages": [USER] * 5000 + [{"role": "robot"}]}, INVALID, "messages[5000].role"),
    "a wrong part in a long message": (
        {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "x"}] * 5000 + [{"type": "text"}]}]},
        INVALID,
        "messages[1].content[5000].text",
    ),
    "no messages and much else": ({"messages": [], "user": "x" * 100_000}, INVALID, "messages"),
    "a wrong id behind many": ({"prompt": [1] * 100_000 + ["2"]}, INVALID, "prompt[100000]"),
    "a list behind many ids": ({"prompt": [1] * 100_000 + [[1, 2]]}, INVALID, "prompt[100000]"),
    "a wrong prompt behind many": ({"prompt": [[1] * 50_000, [1] * 50_000 + [None]]}, INVALID, "prompt[1][50000]"),
    "a prompt of long texts and a number": ({"prompt": ["x" * 70_000, 3]}, INVALID, "prompt[1]"),
    "too many long prompts": ({"prompt": ["x" * 3000] * 33}, INVALID, "prompt"),
    "a prompt that is a long object": ({"prompt": {"a": "x" * 100_000}}, INVALID, "prompt"),
    "a parameter without end": ({"user": "x" * 200_000}, INVALID, "user"),
    "unknown parameters without end": ({f"x{i}": 1 for i in range(50_000)}, INVALID, None),
    "a million wrong messages": ({"messages": [1] * 300_000}, INVALID, "messages[0]"),
    "a role that is not known": ({"messages": [{"role": "robot", "content": "x"}]}, INVALID, "messages[0].role"),
    "content missing": ({"messages": [{"role": "user"}]}, INVALID, "messages[0].content"),
    "model missing": ({"model": None}, INVALID, "model"),
    "model a number": ({"model": 3}, INVALID, "model"),
    "temperature a string": ({"temperature": "1"}, INVALID, "temperature"),
    "temperature true": ({"temperature": True}, INVALID, "temperature"),
    "temperature a list": ({"temperature": [1]}, INVALID, "temperature"),
    "temperature below 0": ({"temperature": -0.1}, INVALID, "temperature"),
    "temperature not a number": ({"temperature": float("nan")}, INVALID, "temperature"),
    "temperature infinite": ({"temperature": float("inf")}, INVALID, "temperature"),
    "top_p infinite": ({"top_p": float("-inf")}, INVALID, "top_p"),
    "stream a string": ({"stream": "yes"}, INVALID, "stream"),
    "seed too large": ({"seed": 2**63}, INVALID, "seed"),
    "seed of a thousand digits": ({"seed": 10**1000}, INVALID, "seed"),
    "top_k too large": ({"top_k": 2**31}, INVALID, "top_k"),
    "max_tokens 0": ({"max_tokens": 0}, INVALID, "max_tokens"),
    "max_tokens 0 without echo": ({"prompt": "a", "max_tokens": 0}, INVALID, "max_tokens"),
    "max_tokens negative": ({"max_tokens": -1}, INVALID, "max_tokens"),
    "max_tokens huge": ({"max_tokens": 2**64}, INVALID, "max_tokens"),
    "max_tokens beyond the context": ({"max_tokens": CONTEXT}, TOO_LONG, "max_tokens"),
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, INVALID, "max_completion_tokens"),
    "max_completion_tokens too large": ({"max_completion_tokens": CONTEXT}, TOO_LONG, "max_completion_tokens"),
    "min_tokens over max_tokens": ({"min_tokens": 3, "max_tokens": 2}, INVALID, "min_tokens"),
    "min_tokens beyond the context": ({"min_tokens": CONTEXT}, INVALID, "min_tokens"),
    "n 0": ({"n": 0}, INVALID, "n"),
    "n too large": ({"n": 17}, INVALID, "n"),
    "n huge": ({"n": 2**70}, INVALID, "n"),
    "a chat longer than the context": ({"messages": [{"role": "user", "content": "x" * 600}]}, TOO_LONG, "messages"),
    "a prompt longer than the context": ({"prompt": "x" * 600}, TOO_LONG, "prompt"),
    "ids longer than the context": ({"prompt": [1] * CONTEXT}, TOO_LONG, "prompt"),
    "one of the prompts too long": ({"prompt": ["a", "x" * 600]}, TOO_LONG, "prompt[1]"),
    "prompt missing": ({"prompt": None}, INVALID, "prompt"),
    "prompt empty": ({"prompt": []}, INVALID, "prompt"),
    "one of the prompts empty": ({"prompt": [[1], []]}, INVALID, "prompt[1]"),
    "too many prompts": ({"prompt": ["a"] * 33}, INVALID, "prompt"),
    "prompts of two kinds": ({"prompt": ["a", [1]]}, INVALID, "prompt[1]"),
    "a prompt of wrong items without end": ({"prompt": [1.5] * 150_000}, INVALID, "prompt[0]"),
    "a token id out of the vocabulary": ({"prompt": [1, 258]}, INVALID, "prompt"),
    "a token id out of it in one prompt": ({"prompt": [[1], [258]]}, INVALID, "prompt[1]"),
    "a huge token id": ({"prompt": [2**64]}, INVALID, "prompt"),
    "a negative token id": ({"prompt": [-1]}, INVALID, "prompt[0]"),
    "stop_token_ids out of the vocabulary": ({"stop_token_ids": [258]}, INVALID, "stop_token_ids"),
    "too many stop_token_ids": ({"stop_token_ids": [1] * 301}, INVALID, "stop_token_ids"),
    "logit_bias out of the vocabulary": ({"logit_bias": {"258": 1}}, INVALID, "logit_bias"),
    "logit_bias for a word": ({"logit_bias": {"the": 1}}, INVALID, "logit_bias"),
    "logit_bias for a number of 5,000 digits": ({"logit_bias": {"1" * 5000: 1}}, INVALID, "logit_bias"),
    "logit_bias too strong": ({"logit_bias": {"5": 1000}}, INVALID, "logit_bias.5"),
    "logit_bias not a number": ({"logit_bias": {"5": float("nan")}}, INVALID, "logit_bias.5"),
    "logit_bias for everything": ({"logit_bias": {str(i): 1 for i in range(50_000)}}, INVALID, "logit_bias"),
    "an empty stop": ({"stop": ""}, INVALID, "stop"),
    "an empty stop among others": ({"stop": ["a", ""]}, INVALID, "stop"),
    "five stops": ({"stop": list("abcde")}, INVALID, "stop"),
    "an empty salt": ({"cache_salt": ""}, INVALID, "cache_salt"),
    "a long salt": ({"cache_salt": "s" * 1025}, INVALID, "cache_salt"),
    "a salt that is none": ({"cache_salt": 7}, INVALID, "cache_salt"),
    "an empty bad word": ({"bad_words": [""]}, INVALID, "bad_words"),
    "a blank bad word": ({"bad_words": [" "]}, INVALID, "bad_words"),
    "too many bad words": ({"bad_words": ["a"] * 301}, INVALID, "bad_words"),
    "logprobs too many": ({"prompt": "a", "logprobs": 21}, INVALID, "logprobs"),
    "top_logprobs too many": ({"logprobs": True, "top_logprobs": 21}, INVALID, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 1}, INVALID, "top_logprobs"),
    "prompt_logprobs too many": ({"prompt": "a", "prompt_logprobs": 21}, INVALID, "prompt_logprobs"),
    "prompt_logprobs of a stream": ({"prompt_logprobs": 1, "stream": True}, INVALID, "prompt_logprobs"),
    "a response format that is not known": ({"response_format": {"type": "xml"}}, INVALID, "response_format.type"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, UNSUPPORTED, "tools"),
    "tool_choice": ({"tool_choice": "required"}, UNSUPPORTED, "tool_choice"),
    "tool_choice of one": ({"tool_choice": {"type": "function"}}, UNSUPPORTED, "tool_choice"),
    "functions": ({"functions": [{"name": "f"}]}, UNSUPPORTED, "functions"),
    "function_call": ({"function_call": "auto"}, UNSUPPORTED, "function_call"),
    "tool calls in a message": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        UNSUPPORTED,
        "messages[0].tool_calls",
    ),
    "images": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        UNSUPPORTED,
        "messages[0].content[0].type",
    ),
    "echo in a chat": ({"echo": True}, UNSUPPORTED, "echo"),
    "best_of": ({"prompt": "a", "best_of": 2}, UNSUPPORTED, "best_of"),
    "suffix": ({"prompt": "a", "suffix": "b"}, UNSUPPORTED, "suffix"),
    "a parameter that is not known": ({"temprature": 1}, INVALID, "temprature"),
    "a parameter with an ugly name": ({"x\n\0y": 1}, INVALID, "a parameter"),
}


def schema(definition) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": definition}}}


AT = "response_format.json_schema.schema"
CHANGES |= {
    "a schema of an unknown type": (schema({"type": "thing"}), INVALID, AT),
    "a schema that is a list": (schema([]), INVALID, AT),
    "a schema with an infinite number": (schema({"minimum": float("inf")}), INVALID, AT),
    "a schema with a huge number": (schema({"minimum": 2**70}), INVALID, AT),
    "a schema with a bad pattern": (schema({"type": "string", "pattern": "["}), INVALID, AT),
    "a schema of a draft that is a number": (schema({"$schema": 3}), INVALID, AT),
    "a schema of an old draft": (
        schema({"$schema": "http://json-schema.org/draft-07/schema#", "type": 1}),
        INVALID,
        AT,
    ),
    "a schema that is too large": (
        schema({"description": "x" * 200_000}),
        INVALID,
        "response_format",
    ),
    "a schema in another's type": (
        {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
        INVALID,
        "response_format",
    ),
}

GOOD = {"model": MODEL, "messages": [USER]}


def nested(depth: int) -> bytes:
    return json.dumps(GOOD)[:-1].encode() + b', "metadata": ' + b"[" * depth + b"]" * depth + b"}"


# name -> (the bytes, words of the message); all are 400 without a param.
BODIES: dict[str, tuple[bytes, str]] = {
    "no body": (b"", "JSON"),
    "half a body": (b'{"model": "tiny"', "JSON"),
    "no JSON": (b"model=tiny", "JSON"),
    "a list": (b"[]", "object"),
    "null": (b"null", "object"),
    "a string": (b'"hi"', "object"),
    "two values": (b"{}{}", "JSON"),
    "not UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', "JSON"),
    "cut in a character": ('{"model": "é'.encode()[:-1], "JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "JSON"),
    "a lone surrogate": (rb'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}', "JSON"),
    "compressed": (b"\x1f\x8b\x08\x00\x00", "JSON"),
    "nested deeply": (nested(100_000), "JSON"),
    "nested beyond any stack": (b"[" * 900_000, "JSON"),
}


@pytest.fixture
async def asked(nats_url, tiny_model):
    """Sends bytes, checks the error's shape and that nobody was bothered, returns (status, error)."""
    cluster = Cluster(nats_url, str(tiny_model))
    cluster.settings = {"max_body_bytes": BODY_LIMIT}
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        workers = await cluster.add(running, "prefill-0", "decode-0")

        async def ask(path: str, content: bytes) -> tuple[int, dict]:
            response = await client.post(path, content=content)
            (error,) = response.json().values()
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-request-id"]
            assert len(response.content) < 1000  # an error never repeats what was sent
            await assert_nothing_left(running)
            assert not any(worker.jobs for worker in workers)
            assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="client_error") == 1
            return response.status_code, error

        yield ask
    for worker in workers:
        await worker.die()


@pytest.mark.parametrize("name", CHANGES)
async def test_bad_values(asked, name):
    change, code, param = CHANGES[name]
    path = COMPLETIONS if "prompt" in change else CHAT
    base = {"model": MODEL} if path == COMPLETIONS else GOOD
    status, error = await asked(path, json.dumps(base | change).encode())
    assert (status, error["code"], error["param"]) == (400, code, param)
    assert param is None or param in error["message"] or code == TOO_LONG


@pytest.mark.parametrize("name", BODIES)
async def test_bad_bodies(asked, name):
    content, words = BODIES[name]
    status, error = await asked(CHAT, content)
    assert (status, error["code"], error["param"]) == (400, INVALID, None)
    assert words in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_unknown_model(asked, path):
    what = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    status, error = await asked(path, json.dumps({"model": "gpt-5", **what}).encode())
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_a_body_over_the_limit(asked):
    status, error = await asked(CHAT, json.dumps(GOOD | {"user": "x" * BODY_LIMIT}).encode())
    assert (status, error["code"], error["param"]) == (413, "request_too_large", None)


async def test_text_that_is_only_strange_is_served(nats_url, tiny_model):
    """NUL, combining marks, characters outside the BMP as a pair of escapes, and right-to-left text are text."""
    cluster = Cluster(nats_url, str(tiny_model))
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        (decode,) = await cluster.add(running, "decode-0")
        content = rb'{"model": "tiny", "max_tokens": 1, "prompt": "\u0000e\u0301\ud83d\ude00\u202e"}'
        response = await client.post(COMPLETIONS, content=content)
        assert response.status_code == 200
        assert len(decode.jobs) == 1
    await decode.die()

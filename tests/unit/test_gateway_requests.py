"""Bad input by name, and what good input becomes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.http import reading
from services.gateway.http.requests import ChatBody, CompletionBody
from shared.errors import InvalidRequest, ModelNotFound, RequestError, UnsupportedParameter

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [USER]}
COMPLETION = {"model": "m", "prompt": "hi"}


def read(body, kind=ChatBody):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return reading.read(kind, data, model="m", max_n=4, max_prompts=3)


BAD_CHAT = {
    "temperature too high": ({"temperature": 2.1}, "temperature"),
    "temperature as text": ({"temperature": "1"}, "temperature"),
    "temperature as truth": ({"temperature": True}, "temperature"),
    "top_p of 0": ({"top_p": 0}, "top_p"),
    "top_k below -1": ({"top_k": -2}, "top_k"),
    "min_p above 1": ({"min_p": 1.1}, "min_p"),
    "seed too large": ({"seed": 2**63}, "seed"),
    "max_tokens of 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens with a fraction": ({"max_tokens": 1.5}, "max_tokens"),
    "max_completion_tokens of 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "min_tokens over the limit": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -3}, "frequency_penalty"),
    "repetition_penalty of 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "five stops": ({"stop": ["a"] * 5}, "stop"),
    "an empty stop": ({"stop": [""]}, "stop"),
    "a blank bad word": ({"bad_words": ["a", "  "]}, "bad_words"),
    "too many bad words": ({"bad_words": ["a"] * 301}, "bad_words"),
    "too many stop ids": ({"stop_token_ids": [1] * 301}, "stop_token_ids"),
    "too many biases": ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    "a bias for no number that fits": ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "top_k beyond any count": ({"top_k": 2**70}, "top_k"),
    "max_tokens beyond any count": ({"max_tokens": 2**70}, "max_tokens"),
    "min_tokens beyond any count": ({"min_tokens": 2**70}, "min_tokens"),
    "a stop that is a number": ({"stop": 3}, "stop"),
    "n of 0": ({"n": 0}, "n"),
    "n too large": ({"n": 5}, "n"),
    "n copies of one greedy answer": ({"n": 2, "temperature": 0}, "n"),
    "logprobs as a number": ({"logprobs": 3}, "logprobs"),
    "top_logprobs alone": ({"top_logprobs": 3}, "top_logprobs"),
    "top_logprobs too large": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "unknown stream option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "logit_bias with words": ({"logit_bias": {"a": 1}}, "logit_bias"),
    "logit_bias too strong": ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    "no messages": ({"messages": []}, "messages"),
    "messages missing": ({"messages": None}, "messages"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    "content missing": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "content of a number": ({"messages": [USER, {"role": "user", "content": 3}]}, "messages[1].content"),
    "response_format of an unknown type": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "json_schema without a schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
        "response_format.json_schema.schema",
    ),
    "a schema with a number beyond any": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": 2**70}}}},
        "response_format.json_schema.schema",
    ),
    "a schema with infinity": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": float("inf")}}}},
        "response_format.json_schema.schema",
    ),
    "unknown parameter": ({"temprature": 1}, "temprature"),
    "service_tier": ({"service_tier": "gold"}, "service_tier"),
}


@pytest.mark.parametrize("name", BAD_CHAT)
def test_bad_chat(name):
    change, param = BAD_CHAT[name]
    with pytest.raises(InvalidRequest) as refused:
        read(CHAT | change)
    assert refused.value.param == param
    assert refused.value.status == 400
    assert refused.value.code == ("unsupported_parameter" if name == "unknown stream option" else "invalid_value")


UNSUPPORTED = {
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "functions": ({"functions": [{}]}, "functions"),
    "modalities": ({"modalities": ["audio"]}, "modalities"),
    "images": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    "tool calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "messages[0].tool_calls"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    change, param = UNSUPPORTED[name]
    with pytest.raises(UnsupportedParameter) as refused:
        read(CHAT | change)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"store": False},
        {"temperature": None},
        {"user": "u", "safety_identifier": "s"},
        {"messages": [{"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}]},
    ],
)
def test_what_asks_for_nothing_is_fine(neutral):
    read(CHAT | neutral)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b'{"model": "\xff"}', "JSON"),
        (b'{"model": "m", "temperature": NaN}', ""),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_malformed(body, words):
    with pytest.raises(InvalidRequest) as refused:
        read(body)
    assert words in refused.value.message


def test_unknown_model():
    with pytest.raises(ModelNotFound) as refused:
        read(CHAT | {"model": "other"})
    assert refused.value.param == "model"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_json_is_anything_but_a_clean_refusal(value):
    for kind, base in ((ChatBody, CHAT), (CompletionBody, COMPLETION)):
        try:
            read(base | {"stop": value, "logit_bias": value, "response_format": value}, kind)
        except RequestError as error:
            assert error.param is not None or "JSON" in error.message  # noqa: PT017


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": [[1], [2, True]]}, "prompt[1][1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 4}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": 1}, "echo"),
    ],
)
def test_bad_completions(change, param):
    with pytest.raises(InvalidRequest) as refused:
        read(COMPLETION | change, CompletionBody)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [("prompt", "hi")]),
        ([1, 2], [("prompt", [1, 2])]),
        ([], [("prompt", [])]),
        (["a", ""], [("prompt[0]", "a"), ("prompt[1]", "")]),
        ([[1], [2, 3]], [("prompt[0]", [1]), ("prompt[1]", [2, 3])]),
    ],
)
def test_the_four_kinds_of_prompt(prompt, expected):
    assert read(COMPLETION | {"prompt": prompt}, CompletionBody).prompts() == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 0}, 2),
        ({"prompt_logprobs": 3}, 3),
    ],
)
def test_when_the_prompt_needs_log_probabilities(change, expected):
    assert read(COMPLETION | change, CompletionBody).sampling(1).prompt_logprobs == expected


def test_a_limit_that_turns_out_too_small():
    body = read(CHAT | {"min_tokens": 5})
    reading.check_limit(body, 5)
    with pytest.raises(InvalidRequest) as refused:
        reading.check_limit(body, 4)
    assert refused.value.param == "min_tokens"


def test_everything_reaches_the_sampling():
    sampling = read(
        CHAT
        | {
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "seed": 7,
            "stop": "x",
            "presence_penalty": 1,
            "repetition_penalty": 1.1,
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": -1},
            "n": 2,
            "ignore_eos": True,
            "min_tokens": 1,
            "bad_words": ["w"],
            "stop_token_ids": [4],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "response_format": {"type": "json_object"},
        }
    ).sampling(9)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.n) == (9, 1.0, 3, 2)
    assert sampling.stop == ["x"]
    assert sampling.logprobs == 2
    assert sampling.logit_bias == {5: -1.0}
    assert sampling.structured == {"json_object": True}
    assert not sampling.skip_special_tokens


def test_what_is_not_given_is_left_to_the_model():
    body = read(CHAT)
    sampling = body.sampling(1)
    assert (sampling.temperature, sampling.top_p, sampling.logprobs) == (None, None, None)
    assert body.limit() is None
    assert read(COMPLETION, CompletionBody).limit() == 16


def test_a_schema_and_limits():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = read(
        CHAT
        | {
            "max_tokens": 5,
            "max_completion_tokens": 6,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        }
    )
    assert body.sampling(1).structured == {"json": schema}
    assert (body.limit(), body.limit_param()) == (6, "max_completion_tokens")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": [1, 99]}, "prompt"),
        ({"stop_token_ids": [99]}, "stop_token_ids"),
        ({"logit_bias": {"99": 1}}, "logit_bias"),
    ],
)
def test_ids_beyond_the_vocabulary(change, param):
    body = read(COMPLETION | change, CompletionBody)
    with pytest.raises(InvalidRequest) as refused:
        reading.check_token_ids(body, {p: one for p, one in body.prompts() if isinstance(one, list)}, 99)
    assert refused.value.param == param

"""Golden answers: the exact bytes of events, the exact shape of bodies; and every error's way to HTTP."""

import json

import pytest

from services.gateway.answer import errors
from services.gateway.answer.receipt import Receipt
from services.gateway.answer.render import Collector, EventWriter, Form, PromptShown, Row, Usage, error_event
from services.gateway.observe import metrics
from shared import wire
from shared.errors import (
    BatonError,
    Cancelled,
    InvalidRequest,
    NoCapacity,
    QueueFull,
    Refused,
    RequestError,
    WorkerLost,
    all_errors,
)


def form(**values) -> Form:
    return Form(
        **{
            "chat": True,
            "id": "id",
            "created": 1,
            "model": "m",
            "n": 1,
            "top_logprobs": None,
            "include_usage": False,
            "return_token_ids": False,
            "service_tier": None,
            "prompt_logprobs": None,
            "prompts": [PromptShown(tokens=[7, 8])],
            "prompt_only": False,
        }
        | values
    )


def row(text="a", choice=0, **values) -> Row:
    return Row(choice=choice, text=text, tokens=wire.pack_tokens([5]), **values)


LENGTH = wire.Finish(reason="length")
ROLE = b'data: {"id":"id","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
TEXT = 'data: {"id":"id","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"é\\n\\""},"logprobs":null,"finish_reason":null}]}\n\n'.encode()
END = b'data: {"id":"id","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'


def test_chat_events():
    writer = EventWriter(form())
    assert writer.rows([row('é\n"'), row("", finish=LENGTH)]) == ROLE + TEXT + END
    assert writer.usage(Usage(prompt=1, completion=1, cached=0)) == b""


def test_completion_event():
    writer = EventWriter(form(chat=False, include_usage=True))
    assert (
        writer.rows([row()])
        == b'data: {"id":"id","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    )


def events(data: bytes) -> list[dict]:
    return [json.loads(part.removeprefix("data: ")) for part in data.decode().split("\n\n") if part]


def test_usage_chunk():
    (chunk,) = events(EventWriter(form(include_usage=True)).usage(Usage(prompt=3, completion=2, cached=1)))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_half_a_character_is_no_event():
    writer = EventWriter(form(chat=False))
    assert writer.rows([row("")]) == b""


def test_token_ids_stream_as_in_vllm():
    first, delta, end = events(EventWriter(form(return_token_ids=True)).rows([row(), row("", finish=LENGTH)]))
    assert first["prompt_token_ids"] == [7, 8]
    assert delta["choices"][0]["token_ids"] == end["choices"][0]["token_ids"] == [5]
    one, two = events(EventWriter(form(chat=False, return_token_ids=True)).rows([row(), row()]))
    assert one["choices"][0]["prompt_token_ids"] == [7, 8]
    assert "prompt_token_ids" not in two["choices"][0]


def top(token: str, token_id: int, logprob: float) -> wire.TopLogprob:
    return wire.TopLogprob(token=token, token_id=token_id, logprob=logprob)


SAMPLED = top("é", 5, -0.25)
LOGPROB = wire.TokenLogprob(
    token=SAMPLED.token,
    token_id=SAMPLED.token_id,
    logprob=SAMPLED.logprob,
    top=[top("e", 4, -0.1), SAMPLED, top("z", 6, float("-inf"))],
)


def test_chat_logprobs():
    _, delta = events(EventWriter(form(top_logprobs=3)).rows([row(logprobs=[LOGPROB])]))
    (content,) = delta["choices"][0]["logprobs"]["content"]
    assert (content["token"], content["logprob"], content["bytes"]) == ("é", -0.25, [195, 169])
    assert [(top["token"], top["logprob"]) for top in content["top_logprobs"]] == [
        ("e", -0.1),
        ("é", -0.25),
        ("z", -9999.0),
    ]


def test_legacy_logprobs_and_offsets():
    writer = EventWriter(form(chat=False, top_logprobs=1))
    deltas = events(writer.rows([row("é", logprobs=[LOGPROB]), row("é", logprobs=[LOGPROB])]))
    assert [d["choices"][0]["logprobs"]["text_offset"] for d in deltas] == [[0], [1]]
    assert deltas[0]["choices"][0]["logprobs"]["top_logprobs"] == [{"é": -0.25, "e": -0.1}]


def test_whole_answers():
    collector = Collector(form(n=2, service_tier="flex", return_token_ids=True))
    collector.rows([row("a"), row("x", 1), row("b", finish=wire.Finish(reason="stop", stop_reason="END"))])
    collector.rows([row("y", 1, finish=LENGTH)])
    body = json.loads(collector.body(Usage(prompt=2, completion=4, cached=0)))
    assert body["service_tier"] == "flex"
    assert body["prompt_token_ids"] == [7, 8]
    assert body["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "ab", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "END",
        "token_ids": [5, 5],
    }
    assert body["choices"][1]["message"]["content"] == "xy"


def test_whole_completion():
    collector = Collector(form(chat=False))
    collector.rows([row("a", finish=LENGTH)])
    body = json.loads(collector.body(Usage(prompt=2, completion=1, cached=0)))
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": "length"}]


def test_error_event():
    assert (
        error_event(WorkerLost("gone"))
        == b'data: {"error":{"message":"gone","type":"server_error","param":null,"code":"worker_lost"}}\n\n'
    )


def test_receipt_is_compact():
    receipt = Receipt(path="whole", reason="r", decode="d")
    assert (
        receipt.comment()
        == b': baton-receipt {"path":"whole","reason":"r","prefill":null,"decode":"d","cached_tokens":0,"predicted_ttft_ms":null,"actual_ttft_ms":null,"retries":0,"stages_ms":null}\n\n'
    )


@pytest.mark.parametrize("code", sorted(all_errors()))
def test_every_error_becomes_http(code):
    cls = all_errors()[code]
    status, headers, body = errors.render(cls("words", param="p", retry_after_s=1.2))
    error = json.loads(body)["error"]
    assert error == {"message": "words", "type": cls.kind, "param": "p", "code": code}
    challenge = {b"www-authenticate": b'Bearer realm="baton"'} if status == 401 else {}
    assert dict(headers) == {b"retry-after": b"2", **challenge}
    assert 400 <= status < 600
    assert (status < 500) == issubclass(cls, RequestError | Cancelled) or issubclass(cls, Refused)
    assert metrics.outcome(cls("words")) in {"client_error", "shed", "error", "cancelled"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "ok"),
        (InvalidRequest("x"), "client_error"),
        (QueueFull("x"), "shed"),
        (NoCapacity("x"), "shed"),
        (Cancelled("x"), "cancelled"),
        (WorkerLost("x"), "error"),
    ],
)
def test_outcomes(error: BatonError | None, expected):
    assert metrics.outcome(error) == expected

"""Golden bytes of every message, read by an independent reader; and messages of older and newer versions."""

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import wire

SAMPLED = "a"
LOGPROB = wire.TokenLogprob(
    token=SAMPLED, token_id=5, logprob=-0.5, top=[wire.TopLogprob(token=SAMPLED, token_id=5, logprob=-0.5)]
)

# One of each, with the bytes that a peer of this version puts on the bus. A change here is a change of the protocol.
GOLDEN: list[tuple[wire.Message, dict]] = [
    (
        wire.DecodeJob(
            request="r",
            attempt=1,
            gateway="g",
            tokens=wire.pack_tokens([1, 256]),
            sampling=wire.Sampling(max_tokens=4, temperature=0.5, logit_bias={3: -1.0}, prompt_logprobs=0),
            prefill=True,
            timeout_s=9.0,
            replay=[wire.pack_tokens([7]), b""],
        ),
        {
            "type": "DecodeJob",
            "request": "r",
            "attempt": 1,
            "gateway": "g",
            "tokens": b"\x01\0\0\0\0\x01\0\0",
            "sampling": {"max_tokens": 4, "temperature": 0.5, "logit_bias": {3: -1.0}, "prompt_logprobs": 0},
            "prefill": True,
            "timeout_s": 9.0,
            "replay": [b"\x07\0\0\0", b""],
        },
    ),
    (
        wire.Accepted(request="r", attempt=1, node="n", lease="l", cached_tokens=2, backlog=wire.Backlog(running=1)),
        {
            "type": "Accepted",
            "request": "r",
            "attempt": 1,
            "node": "n",
            "lease": "l",
            "cached_tokens": 2,
            "backlog": {"running": 1},
        },
    ),
    (
        wire.PrefillJob(request="r", attempt=1, gateway="g", tokens=b"\0\0\0\0", lease="l", node="n", timeout_s=1.0),
        {
            "type": "PrefillJob",
            "request": "r",
            "attempt": 1,
            "gateway": "g",
            "tokens": b"\0\0\0\0",
            "lease": "l",
            "node": "n",
            "timeout_s": 1.0,
        },
    ),
    (
        wire.PrefillDone(request="r", attempt=1, cached_tokens=32),
        {"type": "PrefillDone", "request": "r", "attempt": 1, "cached_tokens": 32},
    ),
    (wire.Busy(reason="queue_full"), {"type": "Busy", "reason": "queue_full"}),
    (wire.Failure(code="c", message="m", param="p"), {"type": "Failure", "code": "c", "message": "m", "param": "p"}),
    (
        wire.TokenBatch(
            worker="d",
            requests=["r", "r"],
            attempts=[0, 0],
            sequences=[0, 1],
            choices=[0, 1],
            texts=["a", "b"],
            tokens=[b"\x05\0\0\0", b"\x06\0\0\0"],
            finish={"1": wire.Finish(reason="stop", stop_reason=7)},
            logprobs={"0": [LOGPROB]},
            failures={"0": wire.Failure(code="c", message="m")},
            usage={"1": wire.DecodeUsage(completion_tokens=2)},
            prompt_logprobs={"0": [None, wire.TokenLogprob(token=SAMPLED, token_id=5, logprob=-2.0, rank=9)]},
            backlog=wire.Backlog(waiting=1, queued_tokens=3),
        ),
        {
            "type": "TokenBatch",
            "worker": "d",
            "requests": ["r", "r"],
            "attempts": [0, 0],
            "sequences": [0, 1],
            "choices": [0, 1],
            "texts": ["a", "b"],
            "tokens": [b"\x05\0\0\0", b"\x06\0\0\0"],
            "finish": {"1": {"reason": "stop", "stop_reason": 7}},
            "logprobs": {
                "0": [
                    {
                        "token": "a",
                        "token_id": 5,
                        "logprob": -0.5,
                        "top": [{"token": "a", "token_id": 5, "logprob": -0.5}],
                    }
                ]
            },
            "failures": {"0": {"code": "c", "message": "m", "type": "Failure"}},
            "usage": {"1": {"completion_tokens": 2}},
            "prompt_logprobs": {"0": [None, {"token": "a", "token_id": 5, "logprob": -2.0, "rank": 9}]},
            "backlog": {"waiting": 1, "queued_tokens": 3},
        },
    ),
    (
        wire.Spans(
            instance="decode-0",
            spans=[
                wire.SpanRecord(
                    name="decode.job",
                    trace_id="a" * 32,
                    span_id="b" * 16,
                    parent_id="c" * 16,
                    root="c" * 16,
                    service="decode",
                    instance="decode-0",
                    start_unix_ns=5,
                    duration_ns=6,
                    attributes={"n": 1, "x": ["y"]},
                    events=[wire.SpanEvent(name="e", unix_ns=7, attributes={"z": 0.5})],
                    status="error",
                    error="timeout",
                )
            ],
            dropped=2,
        ),
        {
            "type": "Spans",
            "instance": "decode-0",
            "spans": [
                {
                    "name": "decode.job",
                    "trace_id": "a" * 32,
                    "span_id": "b" * 16,
                    "parent_id": "c" * 16,
                    "root": "c" * 16,
                    "service": "decode",
                    "instance": "decode-0",
                    "start_unix_ns": 5,
                    "duration_ns": 6,
                    "attributes": {"n": 1, "x": ["y"]},
                    "events": [{"name": "e", "unix_ns": 7, "attributes": {"z": 0.5}}],
                    "status": "error",
                    "error": "timeout",
                }
            ],
            "dropped": 2,
        },
    ),
    (
        wire.SpansWanted(gateway="g", roots=["c" * 16]),
        {"type": "SpansWanted", "gateway": "g", "roots": ["c" * 16]},
    ),
    (wire.TracesAsked(order="slowest", limit=3), {"type": "TracesAsked", "order": "slowest", "limit": 3}),
    (wire.TraceAsked(id="t"), {"type": "TraceAsked", "id": "t"}),
    (wire.MetricsAsked(), {"type": "MetricsAsked"}),
    (wire.MetricsText(text="a 1\n"), {"type": "MetricsText", "text": "a 1\n"}),
    (wire.TraceList(traces=[]), {"type": "TraceList", "traces": []}),
    (
        wire.TraceFound(
            summary=wire.TraceSummary(
                trace_id="t",
                request_id="r",
                start_unix_ms=1,
                duration_ms=2.0,
                ttft_ms=None,
                outcome="ok",
                tier="default",
                tenant="a",
                path="split",
                spans=1,
            ),
            receipt={"path": "split"},
        ),
        {
            "type": "TraceFound",
            "summary": {
                "trace_id": "t",
                "request_id": "r",
                "start_unix_ms": 1,
                "duration_ms": 2.0,
                "ttft_ms": None,
                "outcome": "ok",
                "tier": "default",
                "tenant": "a",
                "path": "split",
                "spans": 1,
                "kept": "sampled",
                "gateway": "",
            },
            "receipt": {"path": "split"},
        },
    ),
    (wire.Cancel(request="r", attempt=2), {"type": "Cancel", "request": "r", "attempt": 2}),
    (wire.Done(), {"type": "Done"}),
    (wire.Ping(), {"type": "Ping"}),
    (wire.Pong(id="w"), {"type": "Pong", "id": "w"}),
    (wire.KvLookup(keys=[b"k"]), {"type": "KvLookup", "keys": [b"k"]}),
    (wire.KvHeld(node="n", blocks=3), {"type": "KvHeld", "node": "n", "blocks": 3}),
    (
        wire.KvFetch(node="n", lease="l", keys=[b"k"]),
        {"type": "KvFetch", "node": "n", "lease": "l", "keys": [b"k"]},
    ),
    (wire.KvRelease(lease="l"), {"type": "KvRelease", "lease": "l"}),
    (wire.KvStatsRequest(), {"type": "KvStatsRequest"}),
    (
        wire.KvStats(node="n", slots={"free": 1}, leases=0, slot_bytes=64),
        {"type": "KvStats", "node": "n", "slots": {"free": 1}, "leases": 0, "slot_bytes": 64},
    ),
    (
        wire.Heartbeat(
            role="decode", id="d", incarnation="i", takes=["decode"], max_running=8, forces=True, lost=["x"]
        ),
        {
            "type": "Heartbeat",
            "role": "decode",
            "id": "d",
            "incarnation": "i",
            "takes": ["decode"],
            "max_running": 8,
            "forces": True,
            "lost": ["x"],
        },
    ),
    (
        wire.Traffic(gateway="g", incarnation="i", up_s=7.5, counts={"shed": {"queue_full": 2.0}}),
        {"type": "Traffic", "gateway": "g", "incarnation": "i", "up_s": 7.5, "counts": {"shed": {"queue_full": 2.0}}},
    ),
]
NAMES = [type(message).__name__ for message, _ in GOLDEN]


@pytest.mark.parametrize(("message", "fields"), GOLDEN, ids=NAMES)
def test_an_independent_reader_sees_the_fields(message, fields):
    assert msgpack.unpackb(wire.encode(message), strict_map_key=False) == fields


@pytest.mark.parametrize(("message", "fields"), GOLDEN, ids=NAMES)
def test_an_independent_writer_is_understood(message, fields):
    assert wire.decode(msgpack.packb(fields)) == message


def test_golden_bytes():
    assert wire.encode(wire.Cancel(request="r", attempt=2)) == b"\x83\xa4type\xa6Cancel\xa7request\xa1r\xa7attempt\x02"


def test_every_message_is_here():
    assert set(NAMES) == {cls.__name__ for cls in wire.Message.__subclasses__()}


@pytest.mark.parametrize(("message", "fields"), GOLDEN, ids=NAMES)
def test_unknown_fields_of_a_newer_version_are_ignored(message, fields):
    assert wire.decode(msgpack.packb({**fields, "field_of_version_9": [1]})) == message


def test_an_older_message_lacks_the_newer_fields():
    """What version 1 required is all that a message needs."""
    old = wire.decode(msgpack.packb({"type": "Heartbeat", "role": "decode", "id": "d", "incarnation": "i"}))
    assert old == wire.Heartbeat(role="decode", id="d", incarnation="i")
    batch = {"type": "TokenBatch", "worker": "d", "requests": [], "attempts": [], "sequences": [], "choices": []}
    assert wire.decode(msgpack.packb({**batch, "texts": [], "tokens": []})).usage == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        msgpack.packb({"type": "Nothing"}),
        msgpack.packb({"type": "Cancel", "request": "r", "attempt": True}),
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(msgspec.DecodeError):
        wire.decode(data)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_pack(ids):
    assert wire.unpack_tokens(wire.pack_tokens(ids)) == ids


def test_tokens_are_little_endian():
    assert wire.pack_tokens([1]) == b"\x01\0\0\0"

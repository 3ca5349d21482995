"""Which traces are kept, in how much memory, and how they are shown; spans and their headers."""

import threading
from random import Random

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from services.gateway.observe.traces import book as books
from services.gateway.observe.traces import export as exports
from services.gateway.observe.traces import view
from services.gateway.observe.traces.book import TraceBook
from services.gateway.observe.traces.export import OtlpExport, from_environment
from services.gateway.observe.traces.sampling import Ending, Sampler, TraceAllowance
from shared import spans, telemetry, wire
from shared.errors import Internal, SettingsError

NOBODY = spans.Parent(0, 0, sampled=False, owner="")


def recorder() -> spans.Recorder:
    return spans.Recorder()


def root(maker: spans.Recorder, *, sampled: bool = True) -> spans.Span:
    return maker.request("gateway.request", "g", NOBODY, sampled=sampled)


def summary(outcome: str = "ok", request: str = "r", **fields) -> wire.TraceSummary:
    values = {"trace_id": "t", "start_unix_ms": 1, "duration_ms": 2.0, "ttft_ms": 1.0, "tier": "default"}
    values |= {"tenant": "a", "path": "split", "spans": 0, **fields}
    return wire.TraceSummary(request_id=request, outcome=outcome, **values)


def remote(owner: spans.Span, name: str = "decode.job", **fields) -> wire.SpanRecord:
    values = {"trace_id": "0" * 32, "span_id": "1" * 16, "parent_id": owner.root, "root": owner.root}
    values |= {"service": "decode", "instance": "d", "start_unix_ns": 5, "duration_ns": 1, **fields}
    return wire.SpanRecord(name=name, **values)


def ending(**fields) -> Ending:
    values = {"outcome": "ok", "duration_s": 1.0, "ttft_s": 0.1, "gap_s": 0.01, "target_ttft_s": 1, "target_itl_s": 0.1}
    return Ending(**{**values, **fields})


# ---- sampling ------------------------------------------------------------------------------------------------


def test_a_bucket_gives_what_it_gets():
    bucket = TraceAllowance(2.0)
    assert sum(bucket.take(100.0) for _ in range(50)) == 20
    assert sum(bucket.take(101.0) for _ in range(50)) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"outcome": "error"}, "error"),
        ({"outcome": "shed", "ttft_s": None, "gap_s": None}, "error"),
        ({"ttft_s": 1.5}, "slow"),
        ({"gap_s": 0.2}, "slow"),
        ({"retries": 1}, "retried"),
    ],
)
def test_what_went_wrong_is_kept_though_it_was_not_sampled(fields, reason):
    sampler = Sampler(0.0, 10.0, Random(1))
    assert not sampler.begins(asked=False, now=1.0)
    assert sampler.ends(ending(**fields), sampled=False, now=1.0) == reason


def test_the_ratio_and_the_rate_hold():
    sampler = Sampler(0.25, 1000.0, Random(1))
    assert 800 < sum(sampler.begins(asked=False, now=1.0) for _ in range(4000)) < 1200
    assert sampler.begins(asked=True, now=1.0)
    few = Sampler(1.0, 1.0, Random(1))
    assert sum(few.begins(asked=True, now=1.0) for _ in range(100)) == 10


# ---- the book ------------------------------------------------------------------------------------------------


def test_spans_that_come_before_the_end_and_after_it_are_in_the_trace():
    exported, maker = [], recorder()
    kept = TraceBook("g", exported.extend)
    maker.gateways["g"] = kept.own
    first = root(maker)
    kept.begin(first)
    with trace.use_span(first, end_on_exit=True), maker.start_as_current_span("gateway.queue"):
        pass
    kept.late([remote(first)])
    assert exported == []
    kept.keep(first.root, summary(), lambda: {"path": "split"})
    kept.late([remote(first, "kv.load", span_id="2" * 16)])
    found = kept.find("r")
    assert {span.name for span in found.spans} == {"gateway.request", "gateway.queue", "decode.job", "kv.load"}
    assert sorted(span.name for span in exported) == sorted(span.name for span in found.spans)
    assert kept.summaries("last", 5)[0].spans == 4
    assert kept.find("nothing").summary is None


def test_what_is_not_kept_leaves_nothing():
    maker, exported = recorder(), []
    kept = TraceBook("g", exported.extend)
    maker.gateways["g"] = kept.own
    first = root(maker, sampled=False)
    kept.begin(first)
    first.end()
    kept.forget(first.root)
    kept.late([remote(first)])
    assert (len(kept), kept.spans, kept.dropped, exported) == (0, 0, 1, [])


def test_memory_is_bounded_and_a_flood_of_refusals_leaves_the_others(monkeypatch):
    monkeypatch.setattr(books, "MAX_TRACES", 10)
    monkeypatch.setattr(books, "MAX_REFUSED", 3)
    maker = recorder()
    kept = TraceBook("g", lambda _: None)
    maker.gateways["g"] = kept.own

    def one(outcome: str, request: str) -> None:
        first = root(maker)
        kept.begin(first)
        first.end()
        kept.keep(first.root, summary(outcome, request), dict)

    for number in range(7):
        one("ok", f"ok-{number}")
    for number in range(50):
        one("shed", f"shed-{number}")
    assert [kept.find(f"ok-{number}").summary is not None for number in range(7)] == [True] * 7
    assert kept.find("shed-49").summary is not None
    assert len(kept) == 10
    one("ok", "ok-7")
    assert (len(kept), kept.find("ok-0").summary) == (10, None)


def test_one_trace_has_no_more_spans_than_may_be(monkeypatch):
    monkeypatch.setattr(books, "MAX_SPANS", 5)
    maker = recorder()
    kept = TraceBook("g", lambda _: None)
    first = root(maker)
    kept.begin(first)
    kept.late([remote(first, span_id=f"{number:016x}") for number in range(9)])
    assert kept.dropped == 4


# ---- spans ---------------------------------------------------------------------------------------------------


def test_context_travels_in_headers_and_in_one_string():
    maker = recorder()
    first = root(maker)
    with trace.use_span(first):
        headers, line = telemetry.inject(), telemetry.traceparent()
    for context in (telemetry.extract(headers), telemetry.from_traceparent(line)):
        child = maker.start_span("kv.push", context=context)
        assert (child.trace_id, child.parent_id, child.root) == (first.trace_id, first.span_id, first.root)
        assert child.owner == f"g/{first.span_id:016x}"
        assert child.sampled


@pytest.mark.parametrize("header", ["", "x", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "1" * 32 + "-1-01"])
def test_headers_that_say_nothing_begin_nothing(header):
    assert telemetry.from_traceparent(header) is not None
    assert recorder().start_span("x", context=telemetry.from_traceparent(header)) is trace.INVALID_SPAN


def test_of_an_exception_only_its_kind_is_kept():
    maker = recorder()
    first = root(maker)
    with pytest.raises(ValueError), trace.use_span(first, end_on_exit=True):
        raise ValueError("the prompt was: secret")
    assert "secret" not in str(spans.record(first, "gateway", "g"))
    assert first.error == "ValueError"
    other = root(maker)
    with pytest.raises(Internal), trace.use_span(other, end_on_exit=True):
        raise Internal("something")
    assert spans.record(other, "gateway", "g").error == "internal_error"


def test_a_recorder_that_is_off_makes_nothing():
    maker = recorder()
    maker.enabled = False
    with trace.use_span(root(maker)):
        assert maker.start_span("x") is trace.INVALID_SPAN


# ---- how a trace is shown ------------------------------------------------------------------------------------


def test_a_clock_that_goes_before_is_moved_and_the_tree_is_in_order():
    first = wire.SpanRecord(
        name="gateway.request",
        trace_id="t",
        span_id="a",
        root="a",
        service="gateway",
        instance="g",
        start_unix_ns=1_000_000,
        duration_ns=9_000_000,
    )
    job = wire.SpanRecord(
        name="decode.job",
        trace_id="t",
        span_id="b",
        parent_id="a",
        root="a",
        service="decode",
        instance="d",
        start_unix_ns=0,
        duration_ns=5_000_000,
        events=[wire.SpanEvent(name="e", unix_ns=500_000)],
    )
    token = wire.SpanRecord(
        name="decode.first_token",
        trace_id="t",
        span_id="c",
        parent_id="b",
        root="a",
        service="decode",
        instance="d",
        start_unix_ns=2_000_000,
        duration_ns=1_000_000,
    )
    shown = view.shown(wire.TraceFound(summary=summary(), spans=[token, job, first]))
    assert [(span["name"], span["start_ms"]) for span in shown["spans"]] == [
        ("gateway.request", 0.0),
        ("decode.job", 0.0),
        ("decode.first_token", 2.0),
    ]
    assert shown["spans"][1]["events"][0]["at_ms"] == 0.5


# ---- OTLP ----------------------------------------------------------------------------------------------------


class Collected(SpanExporter):
    def __init__(self) -> None:
        self.spans = []

    def export(self, spans):
        self.spans += spans
        return SpanExportResult.SUCCESS


def test_exported_spans_are_what_the_sdk_would_have_made():
    collected, maker = Collected(), recorder()
    export = OtlpExport(collected)
    first = root(maker)
    first.set_status(trace.StatusCode.ERROR, "queue_full")
    first.end()
    child = maker.start_span("decode.job", context=spans.in_context(first))
    child.end()
    export([spans.record(first, "gateway", "g"), spans.record(child, "decode", "d")])
    export.close()
    one, two = collected.spans
    assert one.parent is None
    assert (one.status.status_code, one.status.description) == (trace.StatusCode.ERROR, "queue_full")
    assert two.parent.span_id == one.context.span_id
    assert two.resource.attributes["service.name"] == "decode"
    assert two.resource.attributes["service.instance.id"] == "d"


def test_without_a_collector_nothing_is_exported(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "pigeon")
    with pytest.raises(SettingsError, match="pigeon"):
        from_environment()


def test_a_dead_collector_holds_up_neither_requests_nor_the_end(monkeypatch):
    """What waits for it is bounded by the exporter's queue, and closing by CLOSE_S: here by the wait for the event."""
    released = threading.Event()

    class Dead(SpanExporter):
        def export(self, _):
            released.wait(30)  # until it is shut down
            return SpanExportResult.FAILURE

        def shutdown(self):
            released.set()

    monkeypatch.setattr(exports, "CLOSE_S", 0.05)
    export, maker = OtlpExport(Dead()), recorder()
    first = root(maker)
    first.end()
    for _ in range(10_000):
        export([spans.record(first, "gateway", "g")])
    export.close()
    assert released.is_set()

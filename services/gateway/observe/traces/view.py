"""A trace as the dashboard and `baton trace` read it. Pure.

Clocks of different machines differ: where a service's first span would begin before the span that caused it, all of
that service's are moved to begin with it. Invariant: parents come before their children, siblings by their start.
"""

import msgspec

from shared import wire

NS_PER_MS = 1e6


def listing(summaries: list[wire.TraceSummary]) -> dict[str, object]:
    return {"traces": [msgspec.to_builtins(summary) for summary in summaries]}


def shown(found: wire.TraceFound) -> dict[str, object]:
    """Times in ms from the start of the request's first span."""
    summary = found.summary
    if summary is None:
        raise ValueError("nothing was found")
    spans = in_order(aligned(found.spans))
    start_ns = spans[0].start_unix_ns if spans else 0
    return {
        "trace_id": summary.trace_id,
        "request_id": summary.request_id,
        "outcome": summary.outcome,
        "summary": msgspec.to_builtins(summary),
        "receipt": found.receipt,
        "spans": [_span(span, start_ns) for span in spans],
    }


def _span(span: wire.SpanRecord, start_ns: int) -> dict[str, object]:
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "name": span.name,
        "service": span.service,
        "instance": span.instance,
        "start_ms": _ms(span.start_unix_ns - start_ns),
        "duration_ms": _ms(span.duration_ns),
        "attributes": span.attributes,
        "status": span.status,
        "error": span.error,
        "events": [
            {"name": one.name, "at_ms": _ms(one.unix_ns - start_ns), "attributes": one.attributes}
            for one in span.events
        ],
    }


def aligned(spans: list[wire.SpanRecord]) -> list[wire.SpanRecord]:
    by_id = {span.span_id: span for span in spans}
    late_ns: dict[str, int] = {}  # by instance
    for span in spans:
        cause = by_id.get(span.parent_id)
        if cause is not None and cause.instance != span.instance:
            late_ns[span.instance] = max(late_ns.get(span.instance, 0), cause.start_unix_ns - span.start_unix_ns)
    return [_moved(span, late_ns[span.instance]) if late_ns.get(span.instance) else span for span in spans]


def _moved(span: wire.SpanRecord, by_ns: int) -> wire.SpanRecord:
    events = [msgspec.structs.replace(one, unix_ns=one.unix_ns + by_ns) for one in span.events]
    return msgspec.structs.replace(span, start_unix_ns=span.start_unix_ns + by_ns, events=events)


def in_order(spans: list[wire.SpanRecord]) -> list[wire.SpanRecord]:
    """The tree, depth first; what has lost its parent stands behind the root."""
    known = {span.span_id for span in spans}
    children: dict[str, list[wire.SpanRecord]] = {}
    for span in sorted(spans, key=lambda one: one.start_unix_ns):
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    roots = sorted(children.get("", []), key=lambda one: one.span_id != one.root)
    ordered: list[wire.SpanRecord] = []
    todo = roots[::-1]
    while todo:
        span = todo.pop()
        ordered.append(span)
        todo += reversed(children.pop(span.span_id, []))
    return ordered


def _ms(duration_ns: int) -> float:
    return round(duration_ns / NS_PER_MS, 3)

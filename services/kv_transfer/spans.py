"""`kv.push` and `kv.load`: what the blocks of a request did, as spans of its trace.

Invariant: one entry a living write lease with a commit; it goes when the lease ends.
"""

import time
from dataclasses import dataclass

from services.kv_transfer.leases import Lease
from shared import telemetry
from shared.kv.messages import Loaded


@dataclass(slots=True)
class _PushSpan:
    traceparent: str
    first_ns: int
    last_ns: int
    slots: int
    size_bytes: int


class StoreSpans:
    def __init__(self) -> None:
        self._pushes: dict[str, _PushSpan] = {}

    def __len__(self) -> int:
        return len(self._pushes)

    def committed(self, lease: Lease, slots: int, size_bytes: int, started_ns: int) -> None:
        """`started_ns`: when the rank began to copy; 0 where it did not say."""
        if slots == 0:
            return
        now_ns = time.time_ns()
        push = self._pushes.get(lease.id)
        if push is None:
            push = self._pushes[lease.id] = _PushSpan(lease.traceparent, started_ns or now_ns, now_ns, 0, 0)
        push.last_ns = now_ns
        push.slots += slots
        push.size_bytes += size_bytes

    def ended(self, lease: str, ranks: int) -> None:
        push = self._pushes.pop(lease, None)
        if push is None:
            return
        span = telemetry.tracer().start_span(
            telemetry.KV_PUSH,
            context=telemetry.from_traceparent(push.traceparent),
            start_time=push.first_ns,
            attributes={"blocks": push.slots // ranks, "bytes": push.size_bytes, "path": "local"},
        )
        span.end(push.last_ns)

    def loaded(self, lease: Lease, report: Loaded, rank: int, size_bytes: int) -> None:
        span = telemetry.tracer().start_span(
            telemetry.KV_LOAD,
            context=telemetry.from_traceparent(lease.traceparent),
            start_time=report.started_ns,
            attributes={
                "blocks": report.blocks,
                "failed": report.failed,
                "bytes": size_bytes,
                "rank": rank,
                "path": "local",
            },
        )
        span.end(report.ended_ns)

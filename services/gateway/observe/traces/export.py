"""Kept traces to OTLP, by OpenTelemetry's own exporter and its standard OTEL_* variables.

Its batch processor has a thread and a bounded queue of its own: a collector that is dead or slow costs spans, never a
request's time. Without a collector named in the environment nothing is loaded.
"""

import functools
import os
import threading
from collections.abc import Iterable

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from shared import wire
from shared.errors import SettingsError
from shared.version import VERSION

SCOPE = InstrumentationScope("baton", VERSION)
CLOSE_S = 3.0
KINDS = {kind.value: kind for kind in SpanKind}
MAX_RESOURCES = 1024  # services that were heard of


class OtlpExport:
    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)

    def __call__(self, spans: Iterable[wire.SpanRecord]) -> None:
        for span in spans:
            self._processor.on_end(readable(span))

    def close(self) -> None:
        """Send what waits; blocks for CLOSE_S at most. By itself the processor would try a dead collector for 30 s."""
        closing = threading.Thread(target=self._processor.shutdown, name="otlp-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()  # ends its waits between tries
            closing.join(1.0)


def from_environment() -> OtlpExport | None:
    """None: no collector is named. Raises SettingsError for a protocol that cannot be had."""
    env = os.environ
    endpoint = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OtlpExport(OTLPSpanExporter())
    if protocol == "grpc":
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc
        except ImportError:
            raise SettingsError(
                "OTEL_EXPORTER_OTLP_PROTOCOL: grpc needs opentelemetry-exporter-otlp-proto-grpc; "
                "install it, or set http/protobuf"
            ) from None
        return OtlpExport(Grpc())
    raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol!r} is not known: choose http/protobuf or grpc")


def readable(span: wire.SpanRecord) -> ReadableSpan:
    """As OpenTelemetry's SDK would have made it."""
    trace_id = int(span.trace_id, 16)
    failed = span.status == "error"
    return ReadableSpan(
        name=span.name,
        context=_context(trace_id, span.span_id, remote=False),
        parent=_context(trace_id, span.parent_id, remote=True) if span.parent_id else None,
        resource=_resource(span.service, span.instance),
        attributes=span.attributes,
        events=[Event(one.name, one.attributes, one.unix_ns) for one in span.events],
        kind=KINDS.get(span.kind, SpanKind.INTERNAL),
        status=Status(StatusCode.ERROR, span.error or None) if failed else Status(StatusCode.UNSET),
        start_time=span.start_unix_ns,
        end_time=span.start_unix_ns + span.duration_ns,
        instrumentation_scope=SCOPE,
    )


def _context(trace_id: int, span_id: str, *, remote: bool) -> SpanContext:
    return SpanContext(trace_id, int(span_id, 16), remote, TraceFlags(TraceFlags.SAMPLED))


@functools.lru_cache(maxsize=MAX_RESOURCES)
def _resource(service: str, instance: str) -> Resource:
    return Resource.create({"service.namespace": "baton", "service.name": service, "service.instance.id": instance})

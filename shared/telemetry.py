"""Traces and logs, set up the same way in every service.

Span names are design section 9's. Spans go to OTLP when the standard OTEL_EXPORTER_OTLP_* variables name a receiver;
otherwise they are made (so that context travels and logs carry trace ids) and dropped.
Never put prompts, completions, keys or raw headers in a span or log line.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

GATEWAY_REQUEST = "gateway.request"
GATEWAY_ADMISSION = "gateway.admission"
GATEWAY_QUEUE = "gateway.queue"
PREFILL_JOB = "prefill.job"
KV_PUSH = "kv.push"
DECODE_JOB = "decode.job"
KV_LOAD = "kv.load"
DECODE_FIRST_TOKEN = "decode.first_token"  # noqa: S105 - a span's name

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("baton")  # a proxy until `start`; getting one costs 7 µs, and a request opens five spans


def start(service: str, instance: str) -> TracerProvider:
    """Install the process's tracer provider; call `shutdown()` on it before exit so that the last spans leave."""
    provider = TracerProvider(
        resource=Resource.create(
            {"service.namespace": "baton", "service.name": service, "service.instance.id": instance}
        )
    )
    if _otlp_wanted():
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


def tracer() -> trace.Tracer:
    return _tracer


def inject(context: Context | None = None) -> dict[str, str]:
    """W3C headers (`traceparent`) of the current span, for NATS or the local socket."""
    headers: dict[str, str] = {}
    _propagator.inject(headers, context=context)
    return headers


def extract(headers: Mapping[str, str] | None) -> Context:
    """The context a message came with; malformed headers give an empty one."""
    return _propagator.extract(dict(headers or {}))


def traceparent(context: Context | None = None) -> str:
    return inject(context).get("traceparent", "")


def from_traceparent(value: str) -> Context:
    return extract({"traceparent": value} if value else {})


def start_logs(service: str, instance: str, *, log_format: str = "human", level: str = "info") -> None:
    """One handler on stderr; human lines or one JSON object a line, with the trace id where there is one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(service, instance) if log_format == "json" else _HumanLines(instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "nats", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _otlp_wanted() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def _trace_id() -> str:
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""


class _HumanLines(logging.Formatter):
    def __init__(self, instance: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {instance} %(message)s", datefmt="%H:%M:%S")


class _JsonLines(logging.Formatter):
    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._fixed = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._fixed,
            "message": record.getMessage(),
        }
        if trace_id := _trace_id():
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)

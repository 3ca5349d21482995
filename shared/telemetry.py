"""Traces and logs, set up the same way in every service.

Span names are design section 9's. Spans are made by shared/spans.py, and go to the gateway whose request they belong to
(shared/span_sender.py), which keeps them and passes them on to OTLP (services/gateway/observe/traces/).
Never put prompts, completions, keys or raw headers in a span or log line.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client import disable_created_metrics

from shared import spans
from shared.log_writer import LogWriter

GATEWAY_REQUEST = "gateway.request"
GATEWAY_ADMISSION = "gateway.admission"
GATEWAY_QUEUE = "gateway.queue"
PREFILL_JOB = "prefill.job"
KV_PUSH = "kv.push"
DECODE_JOB = "decode.job"
KV_LOAD = "kv.load"
DECODE_FIRST_TOKEN = "decode.first_token"  # noqa: S105 - a span's name

_recorder = spans.Recorder()  # OpenTelemetry, too, has one a process
_writer: LogWriter | None = None


def start(*, enabled: bool = True) -> spans.Recorder:
    """Of this process. Libraries that ask OpenTelemetry for a tracer get it as well."""
    _recorder.enabled = enabled
    disable_created_metrics()  # type: ignore[no-untyped-call] # a third more samples that nobody reads
    if not isinstance(trace.get_tracer_provider(), spans.Provider):
        trace.set_tracer_provider(spans.Provider(_recorder))
    return _recorder


def recorder() -> spans.Recorder:
    return _recorder


def tracer() -> trace.Tracer:
    return _recorder


def inject(context: Context | None = None) -> dict[str, str]:
    """W3C headers of the current span, for NATS; none where there is no span."""
    span = spans.ours(trace.get_current_span(context))
    return spans.headers(span) if span is not None and span.trace_id else {}


def extract(headers: Mapping[str, str] | None) -> Context:
    """The context a message came with; malformed headers give an empty one."""
    if not headers:
        return Context()
    return spans.in_context(spans.parent_of(headers.get("traceparent", ""), headers.get("tracestate", "")))


def traceparent(context: Context | None = None) -> str:
    """The headers as one string, for the local socket and between stores: to be passed on as it is."""
    return " ".join(inject(context).values())


def from_traceparent(value: str) -> Context:
    """Of what `traceparent` has made, or of the header alone."""
    parent, _, state = value.partition(" ")
    return extract({"traceparent": parent, "tracestate": state} if parent else {})


def start_logs(
    service: str, instance: str, *, log_format: str = "human", level: str = "info", aside: bool = False
) -> None:
    """One handler on stderr; human lines or one JSON object a line, with the trace id where there is one.

    `aside`: a thread writes them, so that nobody waits for whoever reads them.
    """
    global _writer  # noqa: PLW0603 - one a process, as stderr is
    _writer = LogWriter(sys.stderr) if aside else None
    handler = logging.StreamHandler(_writer or sys.stderr)
    handler.setFormatter(_JsonLines(service, instance) if log_format == "json" else _HumanLines(instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "nats", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # One line for a batch that is lost; none for each try.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)


def flush_logs() -> None:
    """Before something else is written on stderr."""
    if _writer is not None:
        _writer.close()


def dropped_logs() -> int:
    """Lines that nobody took, since the start."""
    return 0 if _writer is None else _writer.dropped


def log_fields(log: logging.Logger, message: str, fields: Mapping[str, object]) -> None:
    """A line of named values: members of the JSON object, or key=value. Looks up no caller, so it is cheap."""
    if log.isEnabledFor(logging.INFO):
        record = logging.LogRecord(log.name, logging.INFO, "", 0, message, None, None)
        record.fields = fields
        log.handle(record)


def _trace_id() -> str:
    span = spans.ours(trace.get_current_span())
    return format(span.trace_id, "032x") if span is not None and span.trace_id else ""


class _HumanLines(logging.Formatter):
    def __init__(self, instance: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {instance} %(message)s%(trace)s", datefmt="%H:%M:%S")
        self._second, self._time = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """Once a second."""
        if (second := int(record.created)) != self._second:
            self._second, self._time = second, super().formatTime(record, datefmt)
        return self._time

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        trace_id = "" if "trace_id" in fields else _trace_id()
        told = "".join(f" {key}={_word(value)}" for key, value in fields.items())
        record.trace = told + (f" [{trace_id}]" if trace_id else "")
        return super().format(record)


def _word(value: object) -> str:
    """Of a human line."""
    if isinstance(value, dict):
        return ",".join(f"{key}:{one}" for key, one in value.items())
    return str(value)


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
        line |= getattr(record, "fields", {})
        if "trace_id" not in line and (trace_id := _trace_id()):
            line["trace_id"] = trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)

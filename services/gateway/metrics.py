"""What the gateway counts (design section 9), in a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway import genai
from services.gateway.edge.render import Usage
from services.gateway.tally import Tally
from shared.errors import BatonError, Cancelled, Refused, RequestError
from shared.process_metrics import watch_process

LATENCIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 10.0)

WITHIN_TARGET = "baton_requests_within_target"


def outcome(error: BatonError | None) -> str:
    """The label: ok, client_error, shed, error or cancelled."""
    if error is None:
        return "ok"
    for kind, name in ((Cancelled, "cancelled"), (RequestError, "client_error"), (Refused, "shed")):
        if isinstance(error, kind):
            return name
    return "error"


class Metrics:
    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        own = self.registry
        self._requests = Counter(
            "baton_requests_total", "Requests that have ended", ("model", "tier", "outcome"), registry=own
        )
        self._shed = Counter("baton_shed_total", "Requests refused", ("reason",), registry=own)
        self._cancelled = Counter("baton_cancelled_total", "Clients that left, by stage", ("stage",), registry=own)
        self._tokens = Counter("baton_tokens_total", "Tokens served", ("tenant", "model", "kind"), registry=own)
        self._retries = Counter("baton_retries_total", "Jobs given to another worker", ("phase",), registry=own)
        for phase in ("prefill", "decode", "resume"):
            self._retries.labels(phase)
        index_failures = Counter(
            "baton_prefix_index_failures_total", "Look-ups that Redis did not answer", registry=own
        )
        self.index_failed = index_failures.inc
        self._first = Tally(
            "baton_time_to_first_token_seconds", "From the request's first byte", buckets=LATENCIES, registry=own
        )
        self._gap = Tally("baton_inter_token_latency_seconds", "Between deltas", buckets=GAPS, registry=own)
        self._duration = Tally(
            "baton_request_duration_seconds", "From first byte to last", buckets=LATENCIES, registry=own
        )
        self._genai_first = _genai(genai.TIME_TO_FIRST_TOKEN, LATENCIES, own)
        self._genai_gap = _genai(genai.TIME_PER_OUTPUT_TOKEN, GAPS, own)
        self._genai_duration = _genai(genai.DURATION, LATENCIES, own)
        self.gap = self._gap.observe
        self._within = Counter(WITHIN_TARGET, "Requests that kept their tier's targets", ("tier",), registry=own)
        self.tokens = dict.fromkeys(("prompt", "cached", "completion"), 0)  # of all tenants

    def live(
        self,
        *,
        active: Callable[[], int],
        queued: Callable[[], int],
        queued_tokens: Callable[[], int],
        promise_ratio: Callable[[], float],
        workers: Callable[[], dict[tuple[str, str], int]],
        dropped: Callable[[], int],
    ) -> None:
        """Figures that are read when somebody asks."""
        Gauge("baton_active_requests", "In flight or queued", ("model",), registry=self.registry).labels(
            self._model
        ).set_function(active)
        Gauge("baton_queue_depth", "Waiting for a worker", registry=self.registry).set_function(queued)
        Gauge("baton_queue_tokens", "Prompt tokens that wait", registry=self.registry).set_function(queued_tokens)
        Gauge(
            "baton_ttft_prediction_ratio",
            "Measured over predicted time to first token, of late",
            registry=self.registry,
        ).set_function(promise_ratio)
        Gauge("baton_bad_messages", "Messages that could not be used", registry=self.registry).set_function(dropped)
        self.registry.register(_Workers(workers))
        watch_process(self.registry)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)
        self._genai_first.observe(seconds)

    def cancelled(self, stage: str) -> None:
        self._cancelled.labels(stage).inc()

    def retried(self, phase: str) -> None:
        self._retries.labels(phase).inc()

    def ended(self, error: BatonError | None, tier: str, duration_s: float) -> None:
        self._requests.labels(self._model, tier, outcome(error)).inc()
        self._duration.observe(duration_s)
        self._genai_duration.observe(duration_s)
        if isinstance(error, Refused):
            self._shed.labels(error.code).inc()

    def served(self, usage: Usage, decoding_s: float, tenant: str) -> None:
        """`decoding_s`: from the first token to the last. `tenant`: one that a key names, so they are few."""
        for kind, count in (("prompt", usage.prompt), ("cached", usage.cached), ("completion", usage.completion)):
            self._tokens.labels(tenant, self._model, kind).inc(count)
            self.tokens[kind] += count
        if usage.completion > 1:
            self._genai_gap.observe(decoding_s / (usage.completion - 1))

    def within_target(self, tier: str) -> None:
        self._within.labels(tier).inc()


class _Workers(Collector):
    def __init__(self, states: Callable[[], dict[tuple[str, str], int]]) -> None:
        self._states = states

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("baton_workers", "Workers by pool and state", labels=("role", "state"))
        for labels, count in self._states().items():
            family.add_metric(labels, count)
        return [family]


def _genai(name: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Tally:
    return Tally(genai.prometheus(name), "OpenTelemetry GenAI", buckets=buckets, registry=registry)

"""What the gateway counts (design section 9), in a registry of its own."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.answer.render import Usage
from services.gateway.observe import genai
from shared.errors import BatonError, Cancelled, Refused, RequestError
from shared.histogram import LoopHistogram
from shared.process_metrics import watch_process

# Close enough that a percentile within a bucket is off by a fifth at most, where requests usually are.
LATENCIES = (
    *(0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 60.0, 300.0),
)
GAPS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 10.0),
)

NAMED_TENANTS = 100  # of whom tokens are summed apart for the dashboard; those who come later share one sum
LATER_TENANTS = "(others)"
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
    def __init__(self, model: str, *, each_token: bool = True) -> None:
        """`each_token`: off, nothing is counted for each token."""
        self.registry = CollectorRegistry()
        self._model = model
        self.requests = 0  # that were answered
        self._by_label: dict[tuple[str, ...], Counter] = {}  # finding a child takes longer than counting
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
        self.first_token = _twice(
            "baton_time_to_first_token_seconds",
            "From the request's first byte",
            genai.TIME_TO_FIRST_TOKEN,
            LATENCIES,
            own,
        ).observe
        self._duration = _twice(
            "baton_request_duration_seconds", "From first byte to last", genai.DURATION, LATENCIES, own
        ).observe
        gap = LoopHistogram(("baton_inter_token_latency_seconds", "Between deltas"), buckets=GAPS, registry=own)
        self.gap = gap.observe if each_token else _nothing
        self._genai_gap = LoopHistogram(
            (genai.prometheus(genai.TIME_PER_OUTPUT_TOKEN), "OpenTelemetry GenAI"), buckets=GAPS, registry=own
        ).observe
        self._within = Counter(WITHIN_TARGET, "Requests that kept their tier's targets", ("tier",), registry=own)
        self.tokens = dict.fromkeys(("prompt", "cached", "completion"), 0)  # of all tenants
        self.tenants: dict[str, int] = {}  # tokens by tenant, prompt and completion

    def live(
        self,
        *,
        active: Callable[[], int],
        queued: Callable[[], int],
        queued_tokens: Callable[[], int],
        promise_ratio: Callable[[], float],
        workers: Callable[[], dict[tuple[str, str], int]],
        dropped: Callable[[], int],
        streams: Callable[[], int],
        body_bytes: Callable[[], int],
        wanted: Callable[[], dict[str, int]],
        costs: Collector,
        limits: Mapping[str, int],
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
        Gauge("baton_streams", "Answers that are being read from workers", registry=self.registry).set_function(streams)
        Gauge(
            "baton_body_bytes", "Of request bodies that are arriving or being checked", registry=self.registry
        ).set_function(body_bytes)
        self.registry.register(_Workers(workers))
        self.registry.register(_WantedReplicas(wanted))
        self.registry.register(costs)
        most = Gauge("baton_limit", "The most there may be", ("of",), registry=self.registry)
        for of, limit in limits.items():
            most.labels(of).set(limit)
        watch_process(self.registry)

    def cancelled(self, stage: str) -> None:
        self._cancelled.labels(stage).inc()

    def retried(self, phase: str) -> None:
        self._retries.labels(phase).inc()

    def ended(self, error: BatonError | None, tier: str, duration_s: float) -> None:
        self._count(self._requests, self._model, tier, outcome(error)).inc()
        self._duration(duration_s)
        self.requests += error is None
        if isinstance(error, Refused):
            self._shed.labels(error.code).inc()

    def served(self, usage: Usage, decoding_s: float, tenant: str) -> None:
        """`decoding_s`: from the first token to the last. `tenant`: one that a key names, so they are few."""
        for kind, count in (("prompt", usage.prompt), ("cached", usage.cached), ("completion", usage.completion)):
            self._count(self._tokens, tenant, self._model, kind).inc(count)
            self.tokens[kind] += count
        named = tenant in self.tenants or len(self.tenants) < NAMED_TENANTS
        name = tenant if named else LATER_TENANTS
        self.tenants[name] = self.tenants.get(name, 0) + usage.prompt + usage.completion
        if usage.completion > 1:
            self._genai_gap(decoding_s / (usage.completion - 1))

    def _count(self, counter: Counter, *labels: str) -> Counter:
        """Labels are a tier, an outcome, or a tenant that a key names: they are few."""
        child = self._by_label.get(labels)
        if child is None:
            child = self._by_label[labels] = counter.labels(*labels)
        return child

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


class _WantedReplicas(Collector):
    def __init__(self, wanted: Callable[[], dict[str, int]]) -> None:
        self._wanted = wanted

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("baton_wanted_replicas", "Workers that the load calls for", labels=("role",))
        for role, count in self._wanted().items():
            family.add_metric([role], count)
        return [family]


def _twice(name: str, text: str, other: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> LoopHistogram:
    """Under our name and OpenTelemetry's."""
    return LoopHistogram(
        (name, text), (genai.prometheus(other), "OpenTelemetry GenAI"), buckets=buckets, registry=registry
    )


def _nothing(_: float) -> None:
    """Instead of counting."""

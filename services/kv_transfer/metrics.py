"""The store's metrics: sizes are read from it when scraped, flows are counted as they happen."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.kv_transfer.peers.frames import REASONS
from services.kv_transfer.sessions import MAX_SESSIONS
from services.kv_transfer.slots import SlotState
from services.kv_transfer.store import MAX_LEASES, MAX_QUEUED, Store


class KvMetrics:
    def __init__(self, registry: CollectorRegistry, store: Store) -> None:
        moved = Counter("baton_kv_moved_bytes", "KV bytes read out of the arena", ["path"], registry=registry)
        self._moved = moved
        self.moved_local = moved.labels(path="local")
        self.moved_peer = moved.labels(path="peer")
        self.failed_loads = Counter(
            "baton_kv_failed_loads", "Blocks that an engine could not load and computes again", registry=registry
        )
        self.bad_frames = Counter(
            "baton_kv_bad_frames", "Local connections closed for a frame that is none", registry=registry
        )
        self.expired_leases = Counter("baton_kv_expired_leases", "Leases revoked at their deadline", registry=registry)
        self.unhealthy_sessions = Counter(
            "baton_kv_unhealthy_sessions", "Workers told to exit: no answer to a revoke", registry=registry
        )
        self.index_dropped = Counter(
            "baton_kv_index_dropped", "Prefix index updates dropped: backlog full", registry=registry
        )
        self._refused_frames = Counter(
            "baton_kv_refused_frames",
            "Frames, offers and connections of other nodes that were refused",
            ["reason"],
            registry=registry,
        )
        for reason in REASONS:
            self._refused_frames.labels(reason=reason)
        self._failed_transfers = Counter(
            "baton_kv_failed_transfers", "Transfers between nodes that ended early", ["reason"], registry=registry
        )
        self._registry = registry
        registry.register(_StoreCollector(store))

    def refused_frame(self, reason: str) -> None:
        """From any thread."""
        self._refused_frames.labels(reason=reason).inc()

    def failed_transfer(self, reason: str) -> None:
        self._failed_transfers.labels(reason=reason).inc()

    def moved_bytes(self) -> dict[str, int]:
        """By path, since the start: beats carry it."""
        samples = [one for family in self._moved.collect() for one in family.samples if one.name.endswith("_total")]
        return {one.labels["path"]: int(one.value) for one in samples}

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A size that its owner knows; read when scraped."""
        self._registry.register(_GaugeCollector(name, text, read))


class _GaugeCollector(Collector):
    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(self._name, self._text, value=self._read())


class _StoreCollector(Collector):
    """Invariant: the states of `baton_kv_slots` add up to the arena, also before it is cut (then all are zero)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        store = self._store
        counts = store.counts()
        slots = GaugeMetricFamily("baton_kv_slots", "Slots of the arena by state", labels=["state"])
        for state in SlotState:
            slots.add_metric([state.label], counts.get(state.label, 0))
        yield slots
        sizes = store.gauges()
        yield GaugeMetricFamily("baton_kv_leases", "Leases held", value=sizes["leases"])
        yield GaugeMetricFamily("baton_kv_waiting_reservations", "Waiting for room", value=sizes["queued"])
        yield GaugeMetricFamily("baton_kv_waits", "Waits for blocks of others", value=sizes["waits"])
        yield GaugeMetricFamily("baton_kv_sessions", "Workers attached", value=sizes["sessions"])
        yield GaugeMetricFamily("baton_kv_revocations", "Leases over, not yet given up", value=sizes["revocations"])
        limits = GaugeMetricFamily("baton_kv_limit", "The most there may be", labels=["of"])
        for name, limit in (
            ("leases", MAX_LEASES),
            ("waiting_reservations", MAX_QUEUED),
            ("sessions", MAX_SESSIONS),
        ):
            limits.add_metric([name], limit)
        yield limits
        yield CounterMetricFamily("baton_kv_written_bytes", "Bytes committed", value=store.written_bytes)
        yield CounterMetricFamily("baton_kv_kept_blocks", "Stored for the next turn", value=store.kept_blocks)
        yield CounterMetricFamily("baton_kv_unkept_blocks", "Not stored: no room", value=store.unkept_blocks)
        yield CounterMetricFamily("baton_kv_evicted_blocks", "Blocks evicted for room", value=store.evicted_blocks)

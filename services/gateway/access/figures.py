"""What the gateway counts of keys, quotas and usage."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class AccessFigures:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.stale = Gauge(
            "baton_api_keys_stale",
            "1 while the keys' source cannot be read or used; the known keys go on",
            registry=registry,
        )
        self.fallback = Gauge(
            "baton_quota_fallback",
            "1 while Redis is away and this gateway takes its share of limits",
            registry=registry,
        )
        self.shares = Counter("baton_quota_shares", "Requests decided by this gateway's share alone", registry=registry)
        self.dropped = Counter("baton_usage_dropped", "Requests that the account of usage lost", registry=registry)

    def live(
        self,
        *,
        keys: Callable[[], int],
        buckets: Callable[[], int],
        waiting: Callable[[], int],
        pending: Callable[[], int],
    ) -> None:
        for name, words, read in (
            ("baton_api_keys", "Keys that are known", keys),
            ("baton_quota_buckets", "Buckets kept here for when Redis is away", buckets),
            ("baton_quota_waiting", "Questions about limits that wait for Redis", waiting),
            ("baton_usage_pending", "Sums of usage that Redis has not been told yet", pending),
        ):
            Gauge(name, words, registry=self._registry).set_function(read)

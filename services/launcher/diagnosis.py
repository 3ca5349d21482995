"""What is wrong with a cluster, in sentences that say what to look at next. Pure: from what its services say.

Invariant: a healthy cluster, idle or busy, gives no sentence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from shared import wire

SLOW = 0.5  # of the pool's median speed
FULL = 0.9
STALL_S = 1.0
FEW = 20  # requests: shares of fewer say nothing
FAILED = 0.01
REFUSED = 0.05
HOG = 0.5  # of all prompt tokens, while requests wait


@dataclass(frozen=True, slots=True)
class Samples:
    """A gateway's page, read."""

    rows: Sequence[tuple[str, Mapping[str, str], float]] = ()

    @classmethod
    def read(cls, page: str) -> "Samples":
        """Nothing for a page that is none."""
        try:
            families = list(text_string_to_metric_families(page))
        except ValueError:
            return cls()
        return cls([(one.name, one.labels, one.value) for family in families for one in family.samples])

    def by(self, name: str, label: str, **where: str) -> dict[str, float]:
        """Sums by one label."""
        found: dict[str, float] = {}
        for sample, labels, value in self.rows:
            if sample == name and all(labels.get(key) == wanted for key, wanted in where.items()):
                found[labels.get(label, "")] = found.get(labels.get(label, ""), 0.0) + value
        return found

    def total(self, name: str, **where: str) -> float:
        return sum(self.by(name, "", **where).values())

    def most(self, name: str, **where: str) -> float:
        """Of what every gateway says of the whole cluster."""
        return max(self.by(name, "instance", **where).values(), default=0.0)


def problems(seen: Mapping[str, Any], beats: Mapping[str, wire.Heartbeat], samples: Samples) -> list[str]:
    """`seen`: as `baton status --json` prints it. The worst first."""
    services = seen["services"]
    return [
        *_states(services),
        *_connections(samples),
        *_capacity(samples),
        *_slow_workers(beats.values()),
        *_outcomes(samples),
        *_leaks(samples),
    ]


def summary(samples: Samples) -> str:
    """One line of traffic; empty where nothing could be read."""
    if not samples.rows:
        return ""
    outcomes = samples.by("baton_requests_total", "outcome")
    told = ", ".join(f"{count:.0f} {name}" for name, count in sorted(outcomes.items()) if count) or "none yet"
    active, waiting = samples.total("baton_active_requests"), samples.total("baton_queue_depth")
    return f"requests: {active:.0f} active, {waiting:.0f} of them waiting; ended: {told}"


def _states(services: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{one['id']} is {one['state']}: see baton logs {one['id']}"
        for one in services
        if one["state"] not in ("ready", "stopped")
    ]


def _connections(samples: Samples) -> list[str]:
    away = [name for name, value in samples.by("baton_bus_connected", "instance").items() if not value]
    found = [f"{name} has lost NATS" for name in away]
    if 0.0 in samples.by("baton_kv_index_connected", "instance").values():
        found.append("Redis does not answer a store: prefixes on other nodes are not found")
    stalls = samples.by("baton_event_loop_worst_lag_seconds", "instance")
    found += [
        f"{name} stood still for {lag:.1f} s within the last minute: too little CPU?"
        for name, lag in stalls.items()
        if lag > STALL_S
    ]
    return found


def _capacity(samples: Samples) -> list[str]:
    found = []
    waiting = samples.total("baton_queue_depth")
    for role in ("prefill", "decode"):
        wanted = samples.most("baton_wanted_replicas", role=role)
        ready = samples.most("baton_workers", role=role, state="ready")
        if wanted > ready and waiting:
            found.append(
                f"{waiting:.0f} requests wait: the load calls for {wanted:.0f} {role} workers, {ready:.0f} are ready"
            )
    tenants = samples.by("baton_tokens_total", "tenant", kind="prompt")
    if waiting and len(tenants) > 1 and (all_of_them := sum(tenants.values())):
        busiest = max(tenants, key=lambda name: tenants[name])
        if tenants[busiest] > HOG * all_of_them:
            share = tenants[busiest] / all_of_them
            found.append(f"tenant {busiest} has sent {share:.0%} of all prompt tokens, and requests wait")
    slots = samples.by("baton_kv_slots", "instance")
    for store, count in slots.items():
        held = sum(
            samples.total("baton_kv_slots", instance=store, state=state) for state in ("reserved", "pinned", "revoked")
        )
        if count and held / count > FULL:
            found.append(f"{store}: {held / count:.0%} of the KV slots are held by requests")
    usage = samples.by("baton_engine_kv_usage", "instance")
    found += [f"{name}: {used:.0%} of the engine's KV pages are in use" for name, used in usage.items() if used > FULL]
    return found


def _slow_workers(beats: Iterable[wire.Heartbeat]) -> list[str]:
    """A worker is slow by its peers; one alone has none."""
    found = []
    pools: dict[str, list[wire.Heartbeat]] = {}
    for beat in beats:
        if beat.prefill_tokens_per_s:
            pools.setdefault(beat.role, []).append(beat)
    for pool in pools.values():
        for beat in pool:
            others = [one.prefill_tokens_per_s for one in pool if one is not beat]
            if others and beat.prefill_tokens_per_s < SLOW * median(others):
                share = beat.prefill_tokens_per_s / median(others)
                found.append(f"{beat.id} computes prompts at {share:.0%} of the speed of the others in its pool")
    return found


def _outcomes(samples: Samples) -> list[str]:
    outcomes = samples.by("baton_requests_total", "outcome")
    served = sum(outcomes.get(name, 0.0) for name in ("ok", "error", "shed"))
    if served < FEW:
        return []
    found = []
    if (failed := outcomes.get("error", 0.0)) > FAILED * served:
        found.append(f"{failed:.0f} of {served:.0f} requests have failed since the start: baton trace lists the last")
    if (shed := outcomes.get("shed", 0.0)) > REFUSED * served:
        reasons = samples.by("baton_shed_total", "reason")
        told = ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(reasons.items()) if count)
        found.append(f"{shed:.0f} of {served:.0f} requests were refused since the start: {told}")
    return found


def _leaks(samples: Samples) -> list[str]:
    leases = samples.total("baton_kv_leases")
    if leases and not samples.total("baton_active_requests"):
        return [f"{leases:.0f} leases are held while no request runs"]
    return []

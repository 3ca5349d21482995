"""What a service has counted since its start, by family and label, and the arithmetic on it.

Invariants: counts only grow, so a report that got lost costs nothing; families and labels are few, whoever sends them.
"""

import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

from services.gateway.observe.metrics import WITHIN_TARGET, Metrics

Counts = dict[str, dict[str, float]]
Given = Mapping[str, Mapping[str, float]]

REQUESTS = "requests"  # by "tier/outcome"
WITHIN = "within"  # those that kept their tier's targets, by tier
SHED = "shed"  # by reason
TOKENS = "tokens"  # by kind
TENANTS = "tenants"  # tokens by tenant, prompt and completion
RETRIES = "retries"  # by phase
TTFT = "ttft"  # by the upper bound of the bucket in seconds; not cumulative over buckets
GAPS = "gaps"  # the same, between tokens
MOVED = "moved"  # KV bytes by path
SPENT = "spent"  # money, in all
LEVELS = "levels"  # of what goes up and down: a sum over ticks, and how many those were

LABELLED = {
    REQUESTS: ("baton_requests_total", ("tier", "outcome")),
    WITHIN: (WITHIN_TARGET + "_total", ("tier",)),
    SHED: ("baton_shed_total", ("reason",)),
    RETRIES: ("baton_retries_total", ("phase",)),
}
BUCKETS = {TTFT: "baton_time_to_first_token_seconds_bucket", GAPS: "baton_inter_token_latency_seconds_bucket"}
FAMILIES = frozenset({*LABELLED, *BUCKETS, TOKENS, TENANTS, MOVED, SPENT, LEVELS})
MAX_LABELS = 128  # in a family


def read(metrics: Metrics) -> Counts:
    """A gateway's own. Tokens are not read from their metric, which has them by tenant, who may be many."""
    names = {name: family for family, (name, _) in LABELLED.items()} | {
        name: family for family, name in BUCKETS.items()
    }
    counts: Counts = {TOKENS: dict(metrics.tokens), TENANTS: dict(metrics.tenants)}
    for metric in metrics.registry.restricted_registry(list(names)).collect():
        for sample in metric.samples:
            family = names.get(sample.name)
            if family is None:
                continue
            label = sample.labels["le"] if family in BUCKETS else _label(sample.labels, LABELLED[family][1])
            found = counts.setdefault(family, {})
            found[label] = found.get(label, 0.0) + sample.value
    for family in BUCKETS:
        counts[family] = _apart(counts.get(family, {}))
    return counts


def _label(labels: Mapping[str, str], names: Sequence[str]) -> str:
    return "/".join(labels[name] for name in names)


def _apart(cumulative: Mapping[str, float]) -> dict[str, float]:
    """Prometheus counts what is at or below each bound; here each bucket counts its own."""
    found: dict[str, float] = {}
    below = 0.0
    for bound in sorted(cumulative, key=float):
        found[bound] = cumulative[bound] - below
        below = cumulative[bound]
    return found


def growth(new: Given, old: Given) -> Counts:
    """What has been added; nothing where a count has fallen, which none does."""
    grown: Counts = {}
    for family, values in new.items():
        if family not in FAMILIES:
            continue
        before = old.get(family, {})
        more = {label: value - before.get(label, 0.0) for label, value in islice(values.items(), MAX_LABELS)}
        if more := {label: value for label, value in more.items() if value > 0}:
            grown[family] = more
    return grown


def add(counts: Counts, more: Given) -> None:
    for family, values in more.items():
        into = counts.setdefault(family, {})
        for label, value in values.items():
            into[label] = into.get(label, 0.0) + value


def quantiles(buckets: Mapping[str, float], bounds: Sequence[str], shares: Sequence[float]) -> list[float] | None:
    """Linear within a bucket, as Prometheus' histogram_quantile; in the last one its lower bound. None: no sample.

    `bounds`: of all buckets, rising; those without a sample need not be in `buckets`.
    """
    sums = list(accumulate(buckets.get(bound, 0.0) for bound in bounds))
    if not sums or sums[-1] <= 0:
        return None
    found = []
    for share in shares:
        at = bisect.bisect_left(sums, share * sums[-1])
        low, high = float(bounds[at - 1]) if at else 0.0, float(bounds[at])
        before = sums[at - 1] if at else 0.0
        inside = (share * sums[-1] - before) / (sums[at] - before)
        found.append(low if high == float("inf") else low + (high - low) * inside)
    return found

"""The dashboard's arithmetic: counts of several gateways in, rates, percentiles and shares of 15 minutes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from services.gateway.answer.render import Usage
from services.gateway.observe.dashboard import counts
from services.gateway.observe.dashboard.figures import MAX_SOURCES, QUARTER_S, SLOT_S, Figures, Ring
from services.gateway.observe.metrics import LATER_TENANTS, NAMED_TENANTS, Metrics
from shared.errors import Cancelled, InvalidRequest, QueueFull, WorkerLost

BOUNDS = ["0.1", "0.2", "0.5", "+Inf"]


def heard(*reports, now: float = 100.0) -> Figures:
    """One gateway's reports, a second apart; it was new when it was heard first."""
    figures = Figures(now)
    for at, report in enumerate(reports):
        figures.hear("gateway-0", "a", report, now + at, new=True)
        figures.level(now + at, active=2, queued=1)
    return figures


def requests(**outcomes: int) -> dict[str, dict[str, float]]:
    return {counts.REQUESTS: {f"default/{outcome}": float(count) for outcome, count in outcomes.items()}}


# ---- what a gateway has counted ------------------------------------------------------------------------------


def test_a_gateways_metrics_become_counts():
    metrics = Metrics("m")
    for error, tier in ((None, "default"), (None, "flex"), (QueueFull("full"), "default"), (WorkerLost("x"), "flex")):
        metrics.ended(error, tier, 0.1)
    metrics.served(Usage(prompt=10, completion=5, cached=4), 0.1, "acme")
    metrics.served(Usage(prompt=1, completion=1, cached=0), 0.1, "other")
    metrics.within_target("flex")
    metrics.first_token(0.03)
    metrics.first_token(0.03)
    metrics.first_token(1000.0)
    metrics.gap(0.003)
    found = counts.read(metrics)
    assert found[counts.REQUESTS] == {"default/ok": 1, "flex/ok": 1, "default/shed": 1, "flex/error": 1}
    assert found[counts.SHED] == {"queue_full": 1}
    assert found[counts.TOKENS] == {"prompt": 11, "cached": 4, "completion": 6}
    assert found[counts.TENANTS] == {"acme": 15, "other": 2}
    assert found[counts.WITHIN] == {"flex": 1}
    assert {bound: count for bound, count in found[counts.TTFT].items() if count} == {"0.03": 2, "+Inf": 1}
    assert sum(found[counts.GAPS].values()) == 1
    assert set(found) <= counts.FAMILIES


def test_growth_is_what_was_added():
    old = {counts.SHED: {"queue_full": 2.0}, counts.TOKENS: {"prompt": 5.0}}
    new = {counts.SHED: {"queue_full": 2.0, "kv_memory": 1.0}, counts.TOKENS: {"prompt": 9.0}, "unheard_of": {"x": 1.0}}
    assert counts.growth(new, old) == {counts.SHED: {"kv_memory": 1.0}, counts.TOKENS: {"prompt": 4.0}}


def test_tenants_are_bounded():
    metrics = Metrics("m")
    for at in range(NAMED_TENANTS + 5):
        metrics.served(Usage(prompt=1, completion=1, cached=0), 0.1, f"tenant-{at}")
    assert len(metrics.tenants) == NAMED_TENANTS + 1
    assert metrics.tenants[LATER_TENANTS] == 10


def test_labels_are_bounded():
    many = {counts.SHED: {f"reason-{at}": 1.0 for at in range(counts.MAX_LABELS * 2)}}
    assert len(counts.growth(many, {})[counts.SHED]) == counts.MAX_LABELS


@pytest.mark.parametrize(
    ("buckets", "share", "found"),
    [
        ({"0.1": 10.0}, 0.5, 0.05),
        ({"0.2": 4.0}, 0.5, 0.15),  # the bucket begins where the one without a sample ends
        ({"0.1": 5.0, "0.5": 5.0}, 0.9, 0.44),
        ({"0.1": 5.0, "0.5": 5.0}, 0.5, 0.1),
        ({"+Inf": 3.0}, 0.5, 0.5),  # at least the last bound
    ],
)
def test_quantiles_are_linear_within_a_bucket(buckets, share, found):
    assert counts.quantiles(buckets, BOUNDS, [share]) == [pytest.approx(found)]


def test_no_sample_has_no_quantile():
    assert counts.quantiles({}, BOUNDS, [0.5]) is None
    assert counts.quantiles({}, [], [0.5]) is None


@given(st.lists(st.floats(0.001, 0.9), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_a_quantile_is_in_the_bucket_of_the_sample(samples, share):
    registry = CollectorRegistry()
    histogram = Histogram("h", "h", buckets=(0.1, 0.2, 0.5, 1.0), registry=registry)
    for sample in samples:
        histogram.observe(sample)
    cumulative = {s.labels["le"]: s.value for m in registry.collect() for s in m.samples if s.name == "h_bucket"}
    bounds = sorted(cumulative, key=float)
    (found,) = counts.quantiles(counts._apart(cumulative), bounds, [share])
    rank = share * len(samples)
    reached = next(float(bound) for bound in bounds if cumulative[bound] >= rank - 1e-9)
    assert found <= reached + 1e-9
    assert found >= max([0.0, *(float(bound) for bound in bounds if float(bound) < reached)]) - 1e-9


# ---- rings -------------------------------------------------------------------------------------------------


def test_a_ring_forgets_what_is_old():
    ring = Ring(5.0, 20.0)
    for at in range(0, 100, 5):
        ring.add(float(at), {counts.SHED: {"queue_full": 1.0}})
    assert ring.total(99.0, 20.0) == {counts.SHED: {"queue_full": 4.0}}
    assert ring.total(99.0, 10.0) == {counts.SHED: {"queue_full": 2.0}}
    assert len(ring._slots) == ring.size


# ---- figures -----------------------------------------------------------------------------------------------


def test_rates_are_of_the_last_seconds():
    figures = heard(*(requests(ok=10 * at) for at in range(20)))
    assert figures.now(119.0)["rates"]["requests"] == 10.0
    assert figures.now(130.0)["rates"]["requests"] == 0.0
    assert figures.now(130.0)["minute"]["requests"] == {"ok": 190.0}


def test_a_young_gateway_divides_by_its_age():
    assert heard(requests(ok=4), requests(ok=8)).now(102.0)["rates"]["requests"] == 4.0


def test_goodput_counts_what_was_refused_and_leaves_out_the_clients_doing():
    report = requests(ok=6, shed=3, error=1, client_error=50, cancelled=50) | {counts.WITHIN: {"default": 5.0}}
    quarter = heard(report).now(100.0)["quarter"]
    assert quarter["goodput"] == 0.5
    assert quarter["goodput_by_tier"] == {"default": 0.5}
    assert heard(requests(cancelled=1)).now(100.0)["quarter"]["goodput"] is None


def test_gateways_are_added_up_and_a_late_report_says_it_all():
    figures = heard(requests(ok=1))
    figures.hear("gateway-1", "b", requests(ok=1000), 100.0)  # it ran long before: counted from now on
    assert figures.now(100.0)["ended"] == 1
    figures.hear("gateway-1", "b", requests(ok=1007), 103.0)  # two reports between were lost
    assert figures.now(103.0)["ended"] == 8
    assert figures.now(103.0)["minute"]["requests"] == {"ok": 8.0}


def test_a_gateway_that_starts_anew_is_counted_from_zero():
    figures = heard(requests(ok=100))
    figures.hear("gateway-0", "another", requests(ok=3), 101.0)
    assert figures.now(101.0)["ended"] == 103


def test_sources_are_bounded():
    figures = Figures(0.0)
    for at in range(MAX_SOURCES + 5):
        figures.hear(f"g-{at}", "a", requests(ok=1), 1.0, new=True)
    assert figures.ended == MAX_SOURCES


def test_percentiles_prefix_hits_and_moved_bytes():
    figures = heard(
        {
            counts.TTFT: {"0.1": 90.0, "0.2": 10.0, "0.5": 0.0, "+Inf": 0.0},
            counts.TOKENS: {"prompt": 80.0, "cached": 20.0},
            counts.MOVED: {"local": 500.0, "peer": 250.0},
        }
    )
    now = figures.now(100.0)
    assert now["minute"]["ttft_ms"] == {"p50": 55.56, "p95": 150.0, "p99": 190.0}
    assert now["minute"]["itl_ms"] == {"p50": None, "p95": None, "p99": None}
    assert now["minute"]["hits"] == 0.25
    assert now["rates"]["moved_bytes"] == 750.0


def test_the_busiest_tenants_are_named_with_their_share():
    tenants = {"a": 5.0, "flood": 90.0, "b": 3.0, "c": 2.0}
    quarter = heard({counts.TENANTS: tenants}).now(100.0)["quarter"]
    assert quarter["tenants"] == {"flood": 0.9, "a": 0.05, "b": 0.03}
    assert list(quarter["tenants"]) == ["flood", "a", "b"]


def test_cost_is_of_what_was_served():
    figures = heard(requests(ok=4, error=6) | {counts.TOKENS: {"prompt": 150.0, "completion": 50.0}})
    assert figures.now(100.0)["quarter"]["cost"] is None
    figures.level(101.0, spent=0.5)
    figures.level(102.0, spent=0.3)
    assert figures.now(102.0)["quarter"]["cost"] == {"per_million_tokens": 4000, "per_request": 0.2}


def test_history_ends_with_the_newest_complete_slot():
    figures = heard(*(requests(ok=at) for at in range(10)))  # from 100 to 109
    history = figures.history(110.0)
    assert len(history["requests"]["ok"]) == QUARTER_S / SLOT_S
    assert history["requests"]["ok"][-3:] == [None, 0.8, 1.0]  # before, nobody listened
    assert history["active"][-2:] == [2.0, 2.0]
    assert history["ttft_ms"]["p99"][-1] is None
    assert figures.number(110.0) == figures.number(114.9) != figures.number(115.0)


def test_history_forgets_after_a_quarter_of_an_hour():
    figures = heard(requests(ok=5))
    assert figures.history(100.0 + QUARTER_S)["requests"]["ok"][0] == 1.0
    assert figures.now(100.0 + QUARTER_S)["quarter"]["requests"] == {}


def test_outcomes_are_named_as_the_metric_names_them():
    metrics = Metrics("m")
    for error in (Cancelled("x"), InvalidRequest("x")):
        metrics.ended(error, "default", 0.1)
    found = counts.read(metrics)[counts.REQUESTS]
    assert found == {"default/cancelled": 1, "default/client_error": 1}

"""Pages of many services as one; a histogram for one loop; what an autoscaler and whoever pays are told."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.observe.costs import Costs
from services.gateway.observe.replicas import MEMORY_S, Replicas, WaitingLine
from services.gateway.scheduling.members import QUIET_S, Members
from services.gateway.scheduling.predict import Worker
from shared import wire
from shared.exposition import labelled, merged
from shared.histogram import LoopHistogram
from shared.settings import Prices

BUCKETS = (0.001, 0.01, 0.5, 2.0)
NO_LINE = WaitingLine(prompts=0, tokens=0)

# ---- pages ---------------------------------------------------------------------------------------------------


def page(instance: str, value: float) -> str:
    registry = CollectorRegistry()
    Gauge("plain", "A text with {braces} and\nlines", registry=registry).set(value)
    Counter("told", "By label", ["of"], registry=registry).labels(of='a "b" {c} d').inc(value)
    Histogram("took", "Seconds", buckets=BUCKETS, registry=registry).observe(value)
    return labelled(registry, "kv", instance)


def test_pages_become_one_that_prometheus_reads():
    text = merged([page("one", 1), page("two", 2)])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [line for line in text.splitlines() if line.startswith("# TYPE plain ")] == ["# TYPE plain gauge"]
    assert {(s.labels["instance"], s.value) for s in families["plain"].samples} == {("one", 1.0), ("two", 2.0)}
    told = [s for s in families["told"].samples if s.name == "told_total"]
    assert {(s.labels["of"], s.labels["service"]) for s in told} == {('a "b" {c} d', "kv")}
    infinite = [s for s in families["took"].samples if s.labels.get("le") == "+Inf"]
    assert {s.labels["instance"] for s in infinite} == {"one", "two"}


def test_a_family_of_another_type_is_left_out():
    registry = CollectorRegistry()
    Counter("plain", "Not a gauge", registry=registry)
    other = labelled(registry, "kv", "three").replace("plain_total", "plain")
    text = merged([page("one", 1), other])
    assert text.count("# TYPE plain ") == 1
    assert 'plain{service="kv",instance="three"}' not in text


# ---- histogram -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 5) | st.sampled_from(BUCKETS)))
def test_a_loops_histogram_says_what_prometheuss_own_says(values):
    one, other = CollectorRegistry(), CollectorRegistry()
    ours = LoopHistogram(("took", "Seconds"), ("also", "Seconds"), buckets=BUCKETS, registry=one)
    theirs = Histogram("took", "Seconds", buckets=BUCKETS, registry=other)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    shown = generate_latest(one).decode()
    expected = [line for line in generate_latest(other).decode().splitlines() if "_created" not in line]
    assert shown.splitlines()[: len(expected)] == expected
    assert shown.split("# HELP also")[1].replace("also", "took").splitlines()[1:] == expected[1:]


# ---- replicas ------------------------------------------------------------------------------------------------


def heard(role: str, number: int, **fields) -> Worker:
    backlog = wire.Backlog(**fields.pop("backlog", {}))
    beat = wire.Heartbeat(role=role, id=f"{role}-{number}", incarnation="1", takes=[role], **fields)
    return Worker(id=beat.id, takes=frozenset(beat.takes), beat=beat, seen_at=0.0, backlog=backlog)


def replicas(needs: frozenset[str] = frozenset({"decode"})) -> Replicas:
    return Replicas(needs, target_ttft_s=2.0, target_itl_s=0.1)


def test_a_pool_that_is_idle_keeps_one_and_one_that_is_not_needed_none():
    one = replicas()
    one.see([], NO_LINE, 1.0)
    assert one.wanted == {"prefill": 0, "decode": 1}
    one.see([heard("prefill", 0), heard("decode", 0, max_running=8)], NO_LINE, 2.0)
    assert one.wanted == {"prefill": 1, "decode": 1}


def test_what_waits_calls_for_as_many_as_compute_it_within_the_target():
    one = replicas()
    pool = [heard("prefill", 0, prefill_tokens_per_s=1000.0, backlog={"queued_prompts": 1, "queued_tokens": 1000})]
    one.see(pool, WaitingLine(prompts=9, tokens=9000), 1.0)
    assert one.wanted["prefill"] == 5  # 10,000 tokens in 2 s at 1,000/s


def test_decode_follows_sequences_and_kv_memory():
    one = replicas()
    full = [heard("decode", n, max_running=10, backlog={"running": 10}) for n in range(2)]
    one.see(full, WaitingLine(prompts=20, tokens=0), 1.0)
    assert one.wanted["decode"] == 4
    other = replicas()
    other.see([heard("decode", 0, max_running=100, kv_usage=0.9, backlog={"running": 1})], NO_LINE, 1.0)
    assert other.wanted["decode"] == 2


def test_it_rises_at_once_and_falls_slowly():
    one = replicas()
    idle = [heard("prefill", 0, prefill_tokens_per_s=1000.0)]
    one.see(idle, WaitingLine(prompts=1, tokens=20_000), 1.0)
    assert one.wanted["prefill"] == 10
    one.see(idle, NO_LINE, 1.0 + MEMORY_S / 10)
    assert 8 <= one.wanted["prefill"] <= 10
    one.see(idle, NO_LINE, 1.0 + 10 * MEMORY_S)
    assert one.wanted["prefill"] == 1


# ---- costs and who lives -------------------------------------------------------------------------------------


def test_costs_are_shared_by_the_gateways_and_divided_by_what_was_served():
    costs = Costs(Prices(decode=3.6, gateway=0.0, currency="EUR"))
    roles = ["gateway", "gateway", "decode", "decode", "kv"]
    costs.see(roles, tokens=0, requests=0, now=100.0)
    costs.see(roles, tokens=1_000_000, requests=50, now=200.0)
    assert costs.per_hour == pytest.approx(7.2)
    assert costs.total == pytest.approx(0.1)  # half of 7.2 an hour, for 100 s
    samples = {sample.name: sample for metric in costs.collect() for sample in metric.samples}
    assert samples["baton_cost_per_million_tokens"].value == pytest.approx(0.1)
    assert samples["baton_cost_per_request"].value == pytest.approx(0.002)
    assert samples["baton_cost_total"].labels == {"currency": "EUR"}


def test_without_prices_nothing_costs_anything():
    costs = Costs(Prices())
    costs.see(["gateway", "decode"], tokens=5, requests=1, now=1.0)
    assert costs.per("tokens") == 0.0
    assert not math.isnan(costs.total)


def test_the_roster_forgets_who_is_silent():
    heard: list[str] = []
    roster = Members("gateway-0", lambda beat, _: heard.append(beat.id))
    roster.hear(wire.Heartbeat(role="kv", id="kv-0", incarnation="1"), 1.0)
    roster.hear(wire.Heartbeat(role="gateway", id="gateway-0", incarnation="1"), 3.0)
    assert [member.id for member in roster.live(3.5)] == ["kv-0", "gateway-0"]
    assert [member.id for member in roster.live(1.0 + QUIET_S)] == ["gateway-0"]
    assert roster.live(3.5, "decode") == []
    assert heard == ["kv-0", "gateway-0"]
    assert roster.other_gateways(3.5) == []
    assert roster.hears_itself(3.5)
    assert not roster.hears_itself(4.5)

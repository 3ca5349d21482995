"""Token buckets, what a request costs in the end, and how many gateways there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.access.access import Bill, lacking, rate_headers, spent
from services.gateway.access.buckets import PERIOD_S, Amount, Bucket, duration, reset_s, wait_s
from services.gateway.access.client import ANONYMOUS
from services.gateway.access.gateways import GONE_S, GatewayCount
from services.gateway.access.quotas import Taken
from services.gateway.answer.render import Usage
from shared.access.usage_table import Used
from shared.errors import QueueFull, RateLimited, WorkerLost

FULL = Amount(10, 1000)
steps = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 1000)), max_size=60)


@given(steps)
def test_no_span_gets_more_than_the_bucket_and_what_flowed_in(asked):
    bucket, now, taken = Bucket(FULL, 0.0), 0.0, []
    for gap_s, tokens in asked:
        now += gap_s
        if bucket.take(FULL, Amount(1, tokens), now):
            taken.append((now, tokens))
    for first in range(len(taken)):
        requests = tokens = 0
        for at, cost in taken[first:]:
            requests, tokens = requests + 1, tokens + cost
            flowed = (at - taken[first][0]) / PERIOD_S
            assert requests <= FULL.requests * (1 + flowed) + 1e-6
            assert tokens <= FULL.tokens * (1 + flowed) + 1e-6


@given(steps, st.data())
def test_giving_back_never_makes_it_fuller_than_full(asked, data):
    bucket, now = Bucket(FULL, 0.0), 0.0
    for gap_s, tokens in asked:
        now += gap_s
        before = bucket.left
        if bucket.take(FULL, Amount(1, tokens), now):
            bucket.give(FULL, Amount(0, data.draw(st.integers(0, tokens))), now)
        elif gap_s == 0:
            assert bucket.left == before  # both or neither
        assert all(-1e-9 <= left <= limit for left, limit in zip(bucket.left, FULL, strict=True))


@given(st.floats(0, 10), st.floats(0, 1000), st.integers(1, 1000))
def test_the_wait_that_is_told_is_the_wait_that_it_takes(requests, tokens, wanted):
    cost = Amount(1, wanted)
    left = Amount(requests, tokens)
    wait = wait_s(left, FULL, cost)
    assert Bucket(left, 0.0).take(FULL, cost, 0.0) == (wait == 0)
    assert Bucket(left, 0.0).take(FULL, cost, wait + 1e-3)
    if wait > 0.01:
        assert not Bucket(left, 0.0).take(FULL, cost, wait - 0.01)


def test_no_limit_is_no_limit():
    bucket = Bucket(Amount(0, 0), 0.0)
    assert all(bucket.take(Amount(0, 0), Amount(1, 10**9), 0.0) for _ in range(100))


def test_a_clock_that_goes_back_gives_nothing():
    bucket = Bucket(Amount(0, 0), 100.0)
    bucket.refill(FULL, 50.0)
    assert bucket.left == (0, 0)


@given(st.integers(2, 50), st.lists(st.floats(0, 30), min_size=200, max_size=200))
def test_a_share_smaller_than_one_request_keeps_the_rate(gateways, gaps):
    """The long run is the share's; it goes beyond by no more than one request."""
    share = Amount(1 / gateways, 0)
    bucket, now, taken = Bucket(share, 0.0), 0.0, 0
    for gap_s in gaps:
        now += gap_s
        taken += bucket.take(share, Amount(1, 5), now)
    assert 1 <= taken <= share.requests * (1 + now / PERIOD_S) + 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59, "59s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3661, "61m1s"),
    ],
)
def test_durations_as_openai_writes_them(seconds, words):
    assert duration(seconds) == words


def test_headers_say_what_is_left_and_lacking():
    taken = Taken(allowed=False, limits=FULL / 2, left=Amount(0.5, 250), wait_s=6, shared=False)
    assert rate_headers(FULL, taken) == [
        (b"x-ratelimit-limit-requests", b"10"),
        (b"x-ratelimit-remaining-requests", b"0"),
        (b"x-ratelimit-reset-requests", b"54s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"250"),
        (b"x-ratelimit-reset-tokens", b"30s"),
    ]
    assert lacking(taken, Amount(1, 10)) == ["requests"]
    assert lacking(taken, Amount(1, 300)) == ["requests", "tokens"]
    assert reset_s(Amount(-5, 0).requests, 5) == 120  # a debt


def bill(usage: Usage | None = None) -> Bill:
    return Bill(client=ANONYMOUS, model="m", prompt=8, charged=Amount(1, 108), shared=True, usage=usage)


@pytest.mark.parametrize(
    ("made", "error", "began", "generated", "used"),
    [
        (bill(Usage(prompt=8, completion=5, cached=3)), None, True, 5, (1, 8, 3, 5)),
        (bill(), QueueFull("full"), False, 0, (0, 0, 0, 0)),
        (bill(), RateLimited("busy"), True, 0, (0, 0, 0, 0)),
        (bill(), WorkerLost("gone"), True, 0, (1, 8, 0, 0)),
        (bill(), WorkerLost("gone"), True, 4, (1, 8, 0, 4)),
        (bill(), QueueFull("after a resume"), True, 4, (1, 8, 0, 4)),
        (bill(), None, False, 0, (1, 0, 0, 0)),  # torn down while it waited
    ],
)
def test_what_a_request_costs_in_the_end(made, error, began, generated, used):
    found = spent(made, error, began=began, generated=generated)
    assert found == Used(requests=used[0], prompt=used[1], cached=used[2], completion=used[3])


def test_gateways_are_counted_by_their_beats():
    gateways = GatewayCount()
    assert gateways.count() == 1
    gateways.hear("a", 0.0)
    gateways.hear("b", 0.1)
    assert gateways.count() == 2
    gateways.hear("a", GONE_S + 0.05)
    assert gateways.count() == 2
    gateways.hear("a", GONE_S + 0.15)
    assert gateways.count() == 1


def test_a_silent_bus_changes_no_count():
    gateways = GatewayCount()
    gateways.hear("a", 0.0)
    gateways.hear("b", 0.0)
    assert gateways.count() == 2  # at any later time: only a beat of somebody else says that one has gone

"""A tally is shown as prometheus_client's own histogram of the same observations."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.gateway.tally import Tally

BUCKETS = (0.001, 0.01, 0.5, 2.0)
SEEN = (0.0, 0.001, 0.0011, 0.01, 0.3, 0.5, 1.9, 2.0, 2.1, 100.0)


def shown(kind) -> set[str]:
    registry = CollectorRegistry()
    histogram = kind("baton_x_seconds", "Of x", buckets=BUCKETS, registry=registry)
    for value in SEEN:
        histogram.observe(value)
    lines = generate_latest(registry).decode().splitlines()
    return {line for line in lines if "_created" not in line}


def test_it_looks_like_a_histogram():
    assert shown(Tally) == shown(Histogram)
    assert 'baton_x_seconds_bucket{le="0.001"} 2.0' in shown(Tally)

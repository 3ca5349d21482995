"""What `baton status` says is wrong, and that it says nothing of a healthy cluster."""

import pytest

from services.launcher.diagnosis import Samples, problems, summary
from shared import wire

HEALTHY = """
baton_bus_connected{instance="kv-0"} 1
baton_kv_index_connected{instance="kv-0"} 1
baton_event_loop_worst_lag_seconds{instance="kv-0"} 0.02
baton_queue_depth{instance="gateway-0"} 2
baton_active_requests{instance="gateway-0"} 9
baton_wanted_replicas{instance="gateway-0",role="prefill"} 1
baton_workers{instance="gateway-0",role="prefill",state="ready"} 1
baton_tokens_total{instance="gateway-0",kind="prompt",tenant="a"} 50
baton_tokens_total{instance="gateway-0",kind="prompt",tenant="b"} 60
baton_tokens_total{instance="gateway-0",kind="prompt",tenant="c"} 60
baton_kv_slots{instance="kv-0",state="pinned"} 10
baton_kv_slots{instance="kv-0",state="cached"} 90
baton_engine_kv_usage{instance="decode-0"} 0.4
baton_requests_total{instance="gateway-0",outcome="ok"} 1000
baton_requests_total{instance="gateway-0",outcome="shed"} 10
baton_requests_total{instance="gateway-0",outcome="client_error"} 500
baton_shed_total{instance="gateway-0",reason="queue_full"} 10
baton_kv_leases{instance="kv-0"} 4
"""
SERVICES = {"services": [{"id": "prefill-0", "state": "ready"}, {"id": "decode-0", "state": "ready"}]}


def beat(worker: str, speed: float) -> wire.Heartbeat:
    role = worker.split("-", maxsplit=1)[0]
    return wire.Heartbeat(role=role, id=worker, incarnation="1", prefill_tokens_per_s=speed)


def beats(**speeds: float) -> dict[str, wire.Heartbeat]:
    return {name.replace("_", "-"): beat(name.replace("_", "-"), speed) for name, speed in speeds.items()}


def said(page: str, services=SERVICES, **speeds: float) -> list[str]:
    return problems(services, beats(**speeds), Samples.read(page))


def test_a_healthy_cluster_has_no_problem():
    assert said(HEALTHY, prefill_0=900, prefill_1=1000, decode_0=100) == []
    assert "9 active, 2 of them waiting" in summary(Samples.read(HEALTHY))


@pytest.mark.parametrize(
    ("was", "now", "problem"),
    [
        ('bus_connected{instance="kv-0"} 1', 'bus_connected{instance="kv-0"} 0', "kv-0 has lost NATS"),
        ('index_connected{instance="kv-0"} 1', 'index_connected{instance="kv-0"} 0', "Redis"),
        ('worst_lag_seconds{instance="kv-0"} 0.02', 'worst_lag_seconds{instance="kv-0"} 2', "stood still for 2.0 s"),
        ('role="prefill"} 1', 'role="prefill"} 3', "calls for 3 prefill workers, 1 are ready"),
        ('tenant="a"} 50', 'tenant="a"} 5000', "tenant a has sent 98% of all prompt tokens"),
        ('state="pinned"} 10', 'state="pinned"} 1000', "kv-0: 92% of the KV slots are held"),
        ('instance="decode-0"} 0.4', 'instance="decode-0"} 0.95', "decode-0: 95% of the engine's KV"),
        (
            'outcome="shed"} 10',
            'outcome="shed"} 500',
            "500 of 1500 requests were refused since the start: queue_full 10",
        ),
        ('outcome="shed"} 10', 'outcome="error"} 100', "100 of 1100 requests have failed"),
        ('active_requests{instance="gateway-0"} 9', 'active_requests{instance="gateway-0"} 0', "4 leases are held"),
    ],
)
def test_what_is_wrong_is_said(was, now, problem):
    assert was in HEALTHY
    (found,) = said(HEALTHY.replace(was, now))
    assert problem in found


def test_a_slow_worker_stands_out_from_its_pool_only():
    assert said(HEALTHY, prefill_0=1000, prefill_1=200) == [
        "prefill-1 computes prompts at 20% of the speed of the others in its pool"
    ]
    assert said(HEALTHY, prefill_0=1000, decode_0=100) == []


def test_services_that_are_not_ready_come_first():
    lost = {"services": [{"id": "prefill-0", "state": "lost"}, {"id": "nats-0", "state": "ready"}]}
    assert said(HEALTHY, lost) == ["prefill-0 is lost: see baton logs prefill-0"]


def test_a_page_that_is_none_says_nothing():
    assert Samples.read("<html>").rows == () or said("<html>") == []
    assert summary(Samples.read("")) == ""

"""Levels read from metrics pages."""

import pytest

from loadtest.load.levels import Place, Sampler, engine_facts, levels, parsed, summed

KV = """# HELP baton_kv_slots Slots of the arena by state
# TYPE baton_kv_slots gauge
baton_kv_slots{state="free"} 90.0
baton_kv_slots{state="pinned"} 6.0
baton_kv_leases 2.0
baton_kv_limit{of="leases"} 4096.0
"""
GATEWAY = """baton_queue_depth 3.0
baton_active_requests{model="a"} 5.0
baton_active_requests{model="b"} 1e+01
baton_time_to_first_token_seconds_bucket{le="+Inf"} 7.0
process_cpu_seconds_total 12.0
"""
WORKER = "baton_engine_running 4.0\nbaton_engine_waiting 1.0\nbaton_engine_kv_usage 0.25\nbaton_batch_size_sum 9.0\n"


@pytest.mark.parametrize(
    ("role", "page", "expected"),
    [
        ("gateway", GATEWAY, {"queue_depth": 3.0, "active_requests": 15.0}),
        ("kv", KV, {"kv_slots.free": 90.0, "kv_slots.pinned": 6.0, "kv_leases": 2.0}),
        ("decode", WORKER, {"running.w": 4.0, "waiting.w": 1.0, "engine_kv_usage.w": 0.25}),
        ("prefill", "", {}),
        ("redis", KV, {}),
        ("gateway", "<html>not metrics at all</html>", {}),
        ("gateway", "baton_queue_depth oops\nbaton_queue_depth 1e\n", {}),
    ],
)
def test_what_a_service_says(role, page, expected):
    assert levels(Place(role=role, id="w", metrics_url=""), parsed(page)) == expected


def test_nodes_are_added_up():
    assert summed([{"kv_leases": 2.0, "a": 1.0}, {"kv_leases": 3.0}]) == {"kv_leases": 5.0, "a": 1.0}


def test_what_an_engine_is():
    page = 'baton_batch_size_sum 9.0\nbaton_engine_info{engine="sim",profile="a \\"b\\"",block_size="32"} 1.0\n'
    assert engine_facts(page) == {"engine": "sim", "profile": 'a \\"b\\"', "block_size": "32"}
    assert engine_facts(WORKER) == {}


def test_nothing_sampled_is_empty():
    assert Sampler([]).taken().series == {}

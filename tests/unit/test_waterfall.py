"""The picture of a trace in a terminal."""

import pytest

from services.launcher.waterfall import listing, waterfall

SUMMARY = {
    "request_id": "req-1",
    "outcome": "ok",
    "duration_ms": 100.0,
    "ttft_ms": 50.0,
    "tier": "default",
    "tenant": "acme",
    "path": "split",
    "kept": "sampled",
    "spans": 2,
}
TRACE = {
    "trace_id": "t1",
    "request_id": "req-1",
    "outcome": "ok",
    "summary": SUMMARY,
    "receipt": {
        "path": "split",
        "reason": "sooner",
        "prefill": "prefill-0",
        "decode": "decode-0",
        "cached_tokens": 0,
        "retries": 1,
        "stages_ms": {"edge": 1.0, "queue": 49.0},
    },
    "spans": [
        {
            "span_id": "a",
            "parent_id": "",
            "name": "gateway.request",
            "instance": "gateway-0",
            "start_ms": 0.0,
            "duration_ms": 100.0,
            "status": "ok",
            "error": "",
            "attributes": {"gen_ai.usage.input_tokens": 9},
            "events": [{"name": "retry", "at_ms": 12.0, "attributes": {"phase": "prefill", "reason": "worker_lost"}}],
        },
        {
            "span_id": "b",
            "parent_id": "a",
            "name": "decode.job",
            "instance": "decode-0",
            "start_ms": 50.0,
            "duration_ms": 50.0,
            "status": "error",
            "error": "timeout",
            "attributes": {},
            "events": [],
        },
    ],
}


def test_bars_are_in_proportion_and_events_at_their_place():
    lines = waterfall(TRACE, 120).splitlines()
    root = next(line for line in lines if line.startswith("gateway.request"))
    job = next(line for line in lines if line.startswith("  decode.job"))
    assert root.count("█") == pytest.approx(2 * job.count("█"), abs=2)
    assert job.index("█") - root.index("█") == pytest.approx(job.count("█"), abs=1)
    assert any("▸ 12.0 ms retry: phase prefill, reason worker_lost" in line for line in lines)
    assert any("failed: timeout" in line for line in lines)
    assert any("edge 1.0, queue 49.0 ms" in line for line in lines)


@pytest.mark.parametrize("width", [72, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(len(line) for line in waterfall(TRACE, width).splitlines()) <= width


def test_what_took_no_time_is_still_seen_and_nothing_is_no_error():
    spans = [{**TRACE["spans"][0], "duration_ms": 0.0, "events": []}]
    assert "▏" in waterfall({**TRACE, "spans": spans}, 80)
    assert "req-1" in waterfall({**TRACE, "spans": []}, 80)


def test_a_list_has_a_line_a_trace():
    text = listing([SUMMARY, {**SUMMARY, "request_id": "req-2", "ttft_ms": None, "path": None}])
    assert len(text.splitlines()) == 3
    assert "-" in text.splitlines()[2]

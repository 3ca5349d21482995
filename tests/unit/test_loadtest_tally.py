"""From the drivers' notes to columns, timeline and summary."""

from array import array
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load.answer import Outcome
from loadtest.load.records import Row, Share, Try, merged
from loadtest.load.tally import tally
from loadtest.slo import Slo, percentile

SLO = Slo(ttft_s=1.0, itl_s=0.1, itl_share=0.95)


def share(*rows: tuple[Row, list[float]], **more) -> Share:
    """Rows with their events' offsets from the intended time."""
    offsets = array("f")
    for row, events in rows:
        row.events = len(events)
        offsets.extend(events)
    return Share(rows=[row for row, _ in rows], offsets=offsets.tobytes(), cpu_s=0.1, **more)


def answered(intended_s: float, events: list[float], **more) -> tuple[Row, list[float]]:
    given = {"sent_s": intended_s, "ttft_s": events[0], "end_s": intended_s + events[-1], "output_tokens": len(events)}
    return Row(intended_s=intended_s, outcome=Outcome.OK, status=200, **{"attempts": 1, **given, **more}), events


def refused(intended_s: float, outcome=Outcome.SHED, code="queue_full", status=429) -> tuple[Row, list[float]]:
    row = Row(
        intended_s=intended_s,
        sent_s=intended_s,
        end_s=intended_s,
        outcome=outcome,
        code=code,
        status=status,
        attempts=1,
    )
    return row, []


def test_rejections_are_misses():
    found = tally(
        merged([share(answered(0.0, [0.5, 0.55]), *[refused(number / 10) for number in range(3)])]), SLO, 2.0
    ).summary
    assert (found.offered, found.completed, found.good) == (4, 1, 1)
    assert found.good_share == 0.25
    assert found.goodput_per_s == 0.5
    assert found.shed == {"queue_full": 3}
    assert found.outcomes == {"shed": 3, "ok": 1}
    assert found.errors == {}


def test_every_failure_is_a_miss_and_named():
    wrongs = [
        (Outcome.ERROR, "worker_lost", 200),
        (Outcome.CUT, "closed", 200),
        (Outcome.TIMEOUT, "progress", 200),
        (Outcome.UNREACHABLE, "refused", None),
        (Outcome.CLIENT_ERROR, "invalid_value", 400),
        (Outcome.WRONG, "", 200),
    ]
    rows = [refused(0.0, *wrong) for wrong in wrongs]
    found = tally(merged([share(*rows, answered(0.0, [0.1]))]), SLO, 1.0).summary
    assert (found.offered, found.good) == (7, 1)
    assert found.errors == dict.fromkeys(("worker_lost", "closed", "progress", "refused", "invalid_value", "wrong"), 1)


def test_good_needs_first_token_and_gaps_in_time():
    steady = [0.2 + number * 0.1 for number in range(21)]  # 20 gaps of exactly the target
    one_slow = [*steady[:-1], steady[-2] + 0.5]
    two_slow = [*steady[:-2], steady[-3] + 0.5, steady[-3] + 1.0]
    late = [1.5 + offset for offset in steady]
    found = tally(merged([share(*(answered(0.0, events) for events in (steady, one_slow, two_slow, late)))]), SLO, 5.0)
    assert found.requests.good == [True, True, False, False]


def test_rows_of_all_drivers_by_intended_time():
    first = share(answered(0.0, [0.1, 0.2]), answered(2.0, [0.3]))
    second = share(answered(1.0, [0.4, 0.5, 0.9]), answered(1.5, [0.05]))
    found = tally(merged([first, second]), SLO, 3.0).requests
    assert found.intended_s == [0.0, 1.0, 1.5, 2.0]
    assert found.ttft_s == [0.1, 0.4, 0.05, 0.3]
    assert found.itl_max_s == pytest.approx([0.1, 0.4, None, None], abs=1e-5)
    assert found.itl_p50_s == pytest.approx([0.1, 0.1, None, None], abs=1e-5)


offsets = st.lists(st.floats(0.0, 0.9), min_size=1, max_size=12).map(sorted)


@given(st.lists(st.lists(st.tuples(st.floats(0.0, 5.0), offsets), max_size=6), min_size=1, max_size=4))
def test_merging_changes_no_figure(drivers):
    """Each row's gaps are its own, in whichever driver and order it was."""
    table = merged([share(*(answered(*row) for row in driver)) for driver in drivers])
    found = tally(table, SLO, 10.0)
    rows = sorted((row for driver in drivers for row in driver), key=lambda row: row[0])
    assert found.requests.intended_s == pytest.approx([at_s for at_s, _ in rows], abs=1e-6)
    for place, (_, events) in enumerate(rows):
        if [at_s for at_s, _ in rows].count(rows[place][0]) > 1:
            continue  # rows of one intended time may swap
        gaps = [later - earlier for earlier, later in pairwise(events)]
        for column, level in ((found.requests.itl_p50_s, 0.5), (found.requests.itl_p99_s, 0.99)):
            assert column[place] == pytest.approx(percentile(gaps, level), abs=1e-5)
    assert sum(found.timeline.offered) == sum(found.timeline.completed) == len(rows)
    assert sum(found.timeline.tokens) == sum(len(events) for _, events in rows)


def test_timeline_counts_events_where_they_happen():
    found = tally(
        merged([share(answered(0.5, [0.2, 1.0, 2.0]), refused(1.2), refused(2.0, Outcome.CUT, "closed", 200))]),
        SLO,
        3.0,
    ).timeline
    assert found.bucket_s == 1.0
    assert found.t_s == [0.0, 1.0, 2.0]
    assert found.offered == [1, 1, 1]
    assert found.completed == [0, 0, 1]
    assert found.shed == [0, 1, 0]
    assert found.failed == [0, 0, 1]
    assert found.tokens == [1, 1, 1]
    assert found.ttft_p50_s == [0.2, None, None]
    assert found.itl_p50_s == pytest.approx([None, 0.8, 1.0], abs=1e-5)


def test_an_event_of_several_tokens_counts_as_them():
    found = tally(merged([share(answered(0.0, [0.1, 0.2], output_tokens=10))]), SLO, 1.0)
    assert found.timeline.tokens == [10]
    assert found.summary.output_tokens == 10


def test_long_runs_get_wider_buckets():
    found = tally(merged([share(answered(0.0, [0.1]))]), SLO, 3601.0).timeline
    assert found.bucket_s == 7.0
    assert len(found.t_s) <= 600


def test_nothing_offered():
    found = tally(merged([]), SLO, 0.0)
    assert found.summary.offered == 0
    assert found.summary.good_share is None
    assert found.summary.ttft_s.p50 is None
    assert found.timeline.offered == [0]


def test_lateness_is_sent_minus_intended():
    rows = [answered(float(number), [0.5], sent_s=number + number / 1000) for number in range(4)]
    found = tally(merged([share(*rows)]), SLO, 5.0).lateness
    assert (found.p50, found.max) == (pytest.approx(0.001), pytest.approx(0.003))


def test_stages_are_columns():
    one, two = answered(0.0, [0.1], stages_s={"queue": 0.01}), answered(1.0, [0.1], stages_s={"handoff": 0.02})
    found = tally(merged([share(one, two, refused(2.0))]), SLO, 3.0).requests
    assert found.stages == {"queue": [0.01, None, None], "handoff": [None, 0.02, None]}


def test_notes_survive_the_pipe():
    given = share(answered(0.5, [0.25, 0.5], stages_s={"queue": 0.1}), refused(1.0), clipped=3, verified=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=Share) == given


def test_attempts_are_kept_by_request():
    failed = Try(sent_s=0.0, end_s=0.01, outcome=Outcome.SHED, status=429, code="kv_memory", retry_after_s=1.0)
    again = msgspec.structs.replace(failed, sent_s=1.01, end_s=3.2, queued_s=2.0)
    late = answered(0.0, [4.0, 4.01], attempts=3, last_sent_s=3.5, tries=[failed, again], predicted_ttft_s=0.5)
    found = tally(merged([share(answered(0.5, [0.1, 0.6]), late)]), SLO, 5.0)
    assert msgspec.to_builtins(found.tries) == {
        "request": [0, 0],
        "number": [0, 1],
        "sent_s": [0.0, 1.01],
        "end_s": [0.01, 3.2],
        "outcome": ["shed"] * 2,
        "status": [429] * 2,
        "code": ["kv_memory"] * 2,
        "retry_after_s": [1.0, 1.0],
        "queued_s": [None, 2.0],
    }
    told = found.requests
    assert (told.last_sent_s, told.good, told.steady) == ([3.5, None], [False, False], [True, False])
    assert (told.predicted_ttft_s, told.actual_ttft_s) == ([0.5, None], None)

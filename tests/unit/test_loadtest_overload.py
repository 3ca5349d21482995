"""Beyond capacity: what counts once, what counts each time, where the knee is, which aims are met."""

from array import array
from itertools import pairwise

import pytest

from loadtest.cluster.capacity import MOST_CLIENTS, Step, capacity, next_clients
from loadtest.cluster.fairness_result import Fairness, shared
from loadtest.cluster.judge import Window, judge
from loadtest.cluster.overload_result import Overload, Side, checks
from loadtest.load.answer import Outcome
from loadtest.load.records import Row, Share, Try, merged
from loadtest.load.tally import tally
from loadtest.report import fairness as fairness_report
from loadtest.report import overload as overload_report
from loadtest.report import page
from loadtest.result import Client, Git, Lateness, Levels, Machine, Result, Target
from loadtest.slo import Slo

SLO = Slo(ttft_s=2.0, itl_s=0.1)
TARGET = Target(url="http://x", model="m", engine="sim", profile="p", arrangement="split")
MACHINE = Machine(cpu="c", cores=2, memory_gib=1.0, platform="p", python="3")
ALL = Window(start_s=0.0, end_s=10.0)


def refused(sent_s, took_s=0.01, *, code="deadline_infeasible", status=429, retry_after_s=1.0, queued_s=None):
    return Try(
        sent_s=sent_s,
        end_s=sent_s + took_s,
        outcome=Outcome.SHED if status in (429, 503) else Outcome.ERROR,
        status=status,
        code=code,
        retry_after_s=retry_after_s,
        queued_s=queued_s,
    )


def answered(intended_s, first_s, *, tries=(), gap_s=0.02):
    """Its first token `first_s` after the attempt that was let in, which followed the last refusal at once."""
    sent_s = tries[-1].end_s if tries else intended_s
    events = [sent_s + first_s - intended_s + number * gap_s for number in range(5)]
    row = Row(
        intended_s=intended_s,
        sent_s=tries[0].sent_s if tries else intended_s,
        last_sent_s=sent_s,
        ttft_s=events[0],
        end_s=intended_s + events[-1],
        outcome=Outcome.OK,
        status=200,
        attempts=len(tries) + 1,
        tries=list(tries),
    )
    return row, events


def turned_away(*tries):
    last = tries[-1]
    row = Row(
        intended_s=tries[0].sent_s,
        sent_s=tries[0].sent_s,
        last_sent_s=last.sent_s,
        end_s=last.end_s,
        outcome=last.outcome,
        status=last.status,
        code=last.code,
        attempts=len(tries),
        tries=list(tries),
    )
    return row, []


def given_up(sent_s, end_s):
    row = Row(
        intended_s=sent_s,
        sent_s=sent_s,
        last_sent_s=sent_s,
        end_s=end_s,
        outcome=Outcome.LEFT,
        code="interrupted",
        attempts=1,
    )
    return row, []


def result(*rows) -> Result:
    offsets = array("f")
    for row, events in rows:
        row.events = len(events)
        offsets.extend(events)
    found = tally(merged([Share(rows=[row for row, _ in rows], offsets=offsets.tobytes(), cpu_s=0.1)]), SLO, 20.0)
    return Result(
        name="made",
        started_at="2026-01-01T00:00:00Z",
        duration_s=20.0,
        git=Git(revision="0" * 40, dirty=False),
        machine=MACHINE,
        target=TARGET,
        settings={},
        slo=SLO,
        summary=found.summary,
        requests=found.requests,
        timeline=found.timeline,
        levels=Levels(),
        client=Client(processes=1, cpu_share=0.1, lateness_s=Lateness(p50=0, p99=0, max=0), rejected_by_client=0),
        tries=found.tries,
    )


def test_a_request_that_is_let_in_late_counts_once():
    """From its own attempt it is in time, from its first send it is not."""
    found = judge(result(answered(1.0, 0.5, tries=[refused(1.0), refused(2.5)])), ALL)
    assert (found.offered, found.admitted, found.retried, found.helped) == (1, 1, 1, 1.0)
    assert (found.offered_per_s, found.attempts_per_s) == (0.1, pytest.approx(0.3))
    assert (found.within, found.within_request) == (1.0, 0.0)
    assert (found.good_per_s, found.good_request_per_s) == (0.1, 0.0)
    assert found.ttft_s.p50 == pytest.approx(0.5)
    assert found.ttft_request_s.p50 == pytest.approx(2.01)
    assert (found.refusals.count, found.refusals.reasons) == (2, {"deadline_infeasible": 2})


def test_who_is_refused_for_good_is_not_admitted():
    found = judge(result(turned_away(refused(1.0), refused(2.0), refused(3.0)), answered(1.0, 0.1)), ALL)
    assert (found.offered, found.admitted, found.within, found.failed) == (2, 1, 1.0, {})
    assert (found.retried, found.helped, found.refusals.count) == (1, 0.0, 3)


def test_who_gets_no_token_is_a_miss():
    found = judge(result(answered(1.0, 0.1), given_up(1.0, 18.0)), ALL)
    assert (found.admitted, found.unanswered, found.within, found.failed) == (2, 1, 0.5, {})


def test_uneven_tokens_are_in_time_but_not_good():
    found = judge(result(answered(1.0, 0.1), answered(2.0, 0.1, gap_s=0.3)), ALL)
    assert (found.within, found.steady, found.answered_per_s, found.good_per_s) == (1.0, 0.5, 0.2, 0.1)


def test_what_ends_after_the_window_is_no_goodput():
    """Retries after the last arrival meet an idle cluster: they would flatter it."""
    rows = [answered(1.0, 0.5), answered(9.0, 0.5, tries=[refused(9.0, 2.0)])]
    found = judge(result(*rows), ALL)
    assert (found.good_per_s, found.admitted) == (0.1, 1)


def test_refusals_at_arrival_and_from_the_queue():
    rows = [
        turned_away(refused(1.0, 0.02)),
        turned_away(refused(2.0, 0.04)),
        turned_away(refused(3.0, 2.03)),  # so long that it must have waited
        turned_away(refused(4.0, 0.3, queued_s=0.25)),  # the server says so
        turned_away(refused(5.0, 1.5, queued_s=0.0)),  # slow, but it had not waited
    ]
    found = judge(result(*rows), ALL).refusals
    assert (found.at_arrival, found.queued) == (3, 2)
    assert found.arrival_s.max == pytest.approx(1.5)
    assert found.lateness_s.max == pytest.approx(0.03)
    assert found.lateness_s.p50 == pytest.approx(-1.7)


@pytest.mark.parametrize(
    ("how", "faults"),
    [
        ({}, {}),
        ({"code": "no_capacity", "status": 503}, {}),
        ({"code": "no_capacity"}, {"another status": 1}),
        ({"code": "queue_full", "status": 503, "retry_after_s": None}, {"another status": 1, "no Retry-After": 1}),
        ({"code": "http_429"}, {"unknown reason": 1}),
        ({"code": "queue_full", "status": 200, "retry_after_s": None}, {"told inside a stream": 1}),
    ],
)
def test_what_is_wrong_with_a_refusal(how, faults):
    found = judge(result(turned_away(refused(1.0, **how))), ALL)
    assert (found.refusals.wrong, found.refusals.count) == (faults, 1)
    assert (found.admitted, found.failed) == (0, {})


def test_retry_after_against_the_next_who_was_let_in():
    rows = [turned_away(refused(1.0, 0.0, retry_after_s=4.0)), answered(3.0, 0.1), answered(6.0, 0.1)]
    found = judge(result(*rows), ALL).refusals
    assert (found.asked_s.p50, found.needed_s.p50) == (4.0, 2.0)


def found_at(curve) -> list[int]:
    """The concurrencies that are tried where goodput follows `curve`."""
    steps: list[Step] = []
    while (clients := next_clients(steps)) is not None:
        assert len(steps) < 20
        steps.append(
            Step(clients=clients, good_per_s=curve(clients), answered_per_s=0.0, ttft_p50_s=None, ttft_p99_s=None)
        )
    return [step.clients for step in steps]


@pytest.mark.parametrize(
    ("curve", "tried"),
    [
        (lambda n: min(n, 10.0) if n < 30 else 1.0, [1, 2, 4, 8, 16, 32, 24]),  # a knee
        (lambda n: min(n, 6.0), [1, 2, 4, 8, 16, 32, 12]),  # flat
        (lambda n: 0.0, [1, 2, 4]),  # nothing is ever good
        (lambda n: 1.0, [1, 2, 4]),  # one at a time is all
        (float, [2**power for power in range(10)]),  # more than clients can ask
    ],
)
def test_the_knee_is_found_and_the_search_ends(curve, tried):
    found = found_at(curve)
    assert found[: len(tried)] == tried
    assert len(found) <= len(tried) + 1
    assert max(found) <= MOST_CLIENTS
    assert all(later == 2 * before for before, later in pairwise(found[:-1]))


def test_capacity_is_the_best_goodput():
    steps = [
        Step(clients=clients, good_per_s=good, answered_per_s=good, ttft_p50_s=0.1, ttft_p99_s=0.2)
        for clients, good in ((8, 5.0), (16, 9.0), (32, 2.0), (24, 8.0))
    ]
    found = capacity(steps, 8.0)
    assert (found.per_s, [step.clients for step in found.steps]) == (9.0, [8, 16, 24, 32])
    assert "16 clients" in found.how


def sides() -> list[Side]:
    """With admission the second load keeps what the first gives; without, everybody is late."""
    calm = result(*[answered(float(second), 0.1) for second in range(8)])
    held = result(
        *[answered(float(second), 0.5) for second in range(8)],
        *[turned_away(refused(second + 0.5, 0.02)) for second in range(8)],
    )
    late = result(*[answered(float(second), 3.0) for second in range(6)], given_up(7.0, 18.0))
    return [
        Side(name=name, settings={}, target=TARGET, points=[judge(calm, ALL), judge(beyond, ALL)])
        for name, beyond in (("admission on", held), ("admission off", late))
    ]


def test_the_aims():
    on, off = (
        {check.what: (check.values[name], check.met[name]) for check in checks(sides())}
        for name in ("admission on", "admission off")
    )
    assert on["goodput at the highest load, of its peak"] == (1.0, True)
    assert on["admitted within the TTFT target"] == (1.0, True)
    assert on["refusal at arrival, p99"] == (pytest.approx(0.02), True)
    assert off["goodput at the highest load, of its peak"] == (0.0, False)
    assert off["admitted within the TTFT target"] == (0.0, False)
    assert off["refusal at arrival, p99"] == (None, True)


def test_the_page_about_overload():
    found = sides()
    told = Overload(
        started_at="2026-01-01T00:00:00Z",
        git=Git(revision=None, dirty=None),
        machine=MACHINE,
        settings={"seconds": 10.0, "retries": 2, "command": ["python"]},
        slo=SLO,
        capacity=capacity([Step(clients=1, good_per_s=2, answered_per_s=2, ttft_p50_s=0.1, ttft_p99_s=None)], 8.0),
        loads=[0.5, 4.0],
        sides=found,
        checks=checks(found),
    )
    text = page.render(overload_report.page(told))
    assert "deadline_infeasible" in text
    assert text.count("missed") == 2
    assert "4 x" in overload_report.text(told)


def test_fairness_counts_what_was_not_given_up():
    found = shared([result(answered(1.0, 0.2), turned_away(refused(1.0), refused(2.0)), given_up(3.0, 9.0))])
    assert (found.offered, found.answered, found.refused, found.failed, found.attempts) == (2, 1, 1, 0, 4)
    assert found.ttft == [pytest.approx(0.2)]


def test_the_page_about_fairness():
    alone, beside = shared([result(answered(1.0, 0.2))]), shared([result(answered(1.0, 0.5))])
    told = Fairness(
        started_at="2026-01-01T00:00:00Z",
        git=Git(revision=None, dirty=None),
        machine=MACHINE,
        settings={"command": ["python"]},
        target=TARGET,
        capacity=capacity([Step(clients=1, good_per_s=2, answered_per_s=2, ttft_p50_s=0.1, ttft_p99_s=None)], 8.0),
        flood_per_s=6.0,
        alone=alone,
        beside=beside,
        flood=shared([]),
        ratio_p50=2.5,
        ratio_p95=2.5,
        met=False,
    )
    assert "2.50" in fairness_report.text(told)
    assert "beside the flood" in page.render(fairness_report.page(told))

"""States of a journey: what may follow what."""

import pytest

from services.gateway.states import ENDS, NEXT, Course, State, WrongTransition
from tests.support.tracing import watch_spans

SPLIT = [State.ADMISSION, State.QUEUED, State.RESERVING, State.HANDOFF, State.STREAMING, State.DONE]


def test_the_whole_way():
    course = Course()
    for state in SPLIT:
        course.enter(state)
    assert course.state is State.DONE


@pytest.mark.parametrize("state", [State.RESERVING, State.HANDOFF, State.STREAMING])
def test_back_to_the_queue_until_the_end(state):
    """Busy, lost before a token was seen, resumed after one."""
    assert State.QUEUED in NEXT[state]


@pytest.mark.parametrize("state", list(State))
def test_everything_can_fail_and_ends_are_ends(state):
    assert NEXT[state] == frozenset() if state in ENDS else State.FAILED in NEXT[state]


def test_wrong_ways_are_refused():
    course = Course()
    with pytest.raises(WrongTransition):
        course.enter(State.STREAMING)


def test_failing_twice_is_failing_once():
    course = Course()
    course.fail()
    course.fail()
    assert course.state is State.FAILED


def test_spans_are_closed_on_the_way_out():
    spans = watch_spans()
    course = Course()
    course.enter(State.ADMISSION)
    course.enter(State.QUEUED)
    course.fail()
    assert [span.name for span in spans.get_finished_spans()] == ["gateway.admission", "gateway.queue"]

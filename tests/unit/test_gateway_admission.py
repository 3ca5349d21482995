"""Admission: bounds, forecasts, targets, and when to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.scheduling.admission import (
    Appointments,
    Correction,
    Speeds,
    admit,
    empty_s,
    feasible,
    fit,
    fit_text,
    target_s,
    wait_s,
)
from shared.errors import ContextLengthExceeded, Draining, NoCapacity, QueueFull

OPEN = {
    "draining": False,
    "connected": True,
    "decode_alive": True,
    "requests": 0,
    "max_requests": 10,
    "queued_tokens": 10,
    "max_queued_tokens": 10,
    "retry_after_s": lambda: 7.0,
}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"draining": True}, Draining),
        ({"connected": False}, NoCapacity),
        ({"decode_alive": False}, NoCapacity),
        ({"requests": 10}, QueueFull),
        ({"queued_tokens": 11}, QueueFull),
    ],
)
def test_refusals_say_when_to_come_back(change, error):
    with pytest.raises(error) as refused:
        admit(**OPEN | change)
    assert refused.value.retry_after_s > 0


def test_admitted():
    admit(**OPEN)


SPEEDS = Speeds(
    prefill_tokens_per_s=1000,
    backlog_s=0.5,
    prompt_s=0.1,
    token_s=0.002,
    load_s=0.01,
    load_token_s=0.0001,
    prefillers=2,
    free_sequences=3,
    sequences=8,
    requests_per_s=4,
)


def test_what_it_would_take_alone():
    assert empty_s(SPEEDS, 100) == pytest.approx(0.1 + 0.2 + 0.01 + 0.01)
    assert empty_s(Speeds(), 100) is None


@pytest.mark.parametrize(
    ("requests", "tokens", "expected"),
    [
        (0, 0, 0.5),  # what workers have already
        (1, 1000, 0.5 + 1.0 + 0.05),
        (2, 0, 0.5 + 0.1),
        (12, 0, 10 / 4),  # sequences are what is missing: 13 wanted, 3 free, 4 a second
    ],
)
def test_the_wait_is_for_what_is_scarcer(requests, tokens, expected):
    assert wait_s(SPEEDS, requests, tokens) == pytest.approx(expected)


def test_nothing_known_is_no_wait():
    assert wait_s(Speeds(), 100, 10**6) == 0


def test_a_long_prompt_has_a_longer_target():
    assert target_s(2.0, 0.1) == 1.9
    assert target_s(2.0, 10.0) == 15.0


@pytest.mark.parametrize(
    ("expected", "waits", "idle", "answer"),
    [
        (2.0, True, False, True),
        (2.1, True, False, False),
        (2.1, False, False, False),
        (2.1, True, True, False),
        (9.9, False, True, True),  # an idle cluster refuses nothing
    ],
)
def test_feasible(expected, waits, idle, answer):
    assert feasible(expected_s=expected, target=2.0, waits=waits, idle=idle) is answer


def test_nothing_is_corrected_before_something_is_known():
    correction = Correction()
    assert correction(3.0) == 3.0
    assert correction.ratio == 1.0


def test_what_was_measured_corrects_what_is_predicted():
    correction = Correction()
    for predicted in (0.1, 0.5, 1.0, 2.0) * 50:
        correction.see(predicted, 0.05 + 1.5 * predicted)
    assert correction(1.0) == pytest.approx(1.55, rel=0.05)
    assert correction.ratio > 1.4


def test_a_hiccup_does_not_shut_the_door():
    correction = Correction()
    for _ in range(50):
        correction.see(0.1, 0.1)
    correction.see(0.1, 600.0)
    assert correction(0.1) < 0.2


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10_000)), max_size=60), st.floats(0, 100))
def test_corrections_are_sane(seen, predicted):
    correction = Correction()
    for one in seen:
        correction.see(*one)
    assert 0 <= correction(predicted) < float("inf")


def test_clients_are_told_one_after_the_other():
    appointments = Appointments()
    told = [appointments.next_s(10.0, missing_s=1.0, cost_s=0.5) for _ in range(4)]
    assert told == pytest.approx([1.5, 2.0, 2.5, 3.0])
    # Real time works the promises off.
    assert appointments.next_s(100.0, missing_s=1.0, cost_s=0.5) == pytest.approx(1.5)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10**6), st.floats(0, 10**3)), max_size=40))
def test_retry_after_is_bounded(refusals):
    appointments, now = Appointments(), 0.0
    for later, missing, cost in refusals:
        now += later
        assert 1.0 <= appointments.next_s(now, missing_s=missing, cost_s=cost) <= 60.0


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "outcome"),
    [
        (10, None, 100, 90),
        (10, 90, 100, 90),
        (10, 91, 100, "max_tokens"),
        (100, None, 100, "prompt"),
        (100, 1, 100, "prompt"),
        (99, None, 100, 1),
        (10**6, 7, 0, 7),
    ],
)
def test_fit(prompt, asked, context, outcome):
    def ask() -> int:
        return fit(prompt, asked, context, prompt_param="prompt", limit_param="max_tokens")

    if isinstance(outcome, int):
        assert ask() == outcome
    else:
        with pytest.raises(ContextLengthExceeded) as refused:
            ask()
        assert refused.value.param == outcome


def test_a_text_that_no_tokens_could_hold_is_not_tokenised():
    fit_text(2 * 16 * 100, 16, 100, param="prompt")
    fit_text(10**9, 16, 0, param="prompt")  # no worker has said yet
    with pytest.raises(ContextLengthExceeded, match="100 tokens; the prompt has 3201 characters") as refused:
        fit_text(2 * 16 * 100 + 1, 16, 100, param="messages")
    assert refused.value.param == "messages"

"""What a worker measures of itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.line import LEAST, Line
from shared.worker.rates import Prompts, Steps


def line(*points, proportional=True) -> Line:
    seen = Line(proportional=proportional)
    for point in points:
        seen.see(*point)
    return seen


def test_nothing_is_said_before_enough_has_been_seen():
    assert line(*[(100, 1.0)] * (LEAST - 1)).terms() == (0, 0)
    assert line(*[(100, 1.0)] * LEAST).is_known


def test_it_finds_both_terms():
    fixed, slope = line(*[(x, 0.5 + 0.01 * x) for x in (10, 100, 400, 1000) * 20]).terms()
    assert fixed == pytest.approx(0.5, rel=0.1)
    assert slope == pytest.approx(0.01, rel=0.05)


def test_where_x_is_always_alike_the_prior_speaks():
    fixed, slope = line(*[(100, 1.0)] * 20).terms()
    assert (fixed, slope) == pytest.approx((0, 0.01))
    fixed, slope = line(*[(8, 0.02)] * 20, proportional=False).terms()
    assert (fixed, slope) == pytest.approx((0.02, 0))


def test_old_observations_fade():
    seen = line(*[(100, 1.0)] * 100, *[(100, 3.0)] * 100)
    fixed, slope = seen.terms()
    assert fixed + 100 * slope == pytest.approx(3.0, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 10**4)), max_size=80), st.booleans())
def test_no_term_is_ever_negative(points, proportional):
    fixed, slope = line(*points, proportional=proportional).terms()
    assert fixed >= 0
    assert slope >= 0


def test_a_token_never_costs_nothing():
    """Longer prompts that took less by chance: a worker of no speed would count as one that nothing is known of."""
    fixed, slope = line(*((100, 0.0131), (400, 0.0129)) * 9, proportional=True).terms()
    assert slope > 0
    assert fixed + 250 * slope == pytest.approx(0.013, rel=0.01)


def test_a_prompt_costs_what_it_adds():
    prompts = Prompts()
    # Four that come together and are computed one after the other, each in 0.1 s.
    for turn in range(10):
        start = turn * 10.0
        for number in range(4):
            prompts.begin((f"{turn}-{number}", 0), 1000, start)
        for number in range(4):
            prompts.done((f"{turn}-{number}", 0), 1000, start + 0.1 * (number + 1))
    fixed, slope = prompts.line.terms()
    assert fixed + 1000 * slope == pytest.approx(0.1, rel=0.01)


def test_prompts_of_one_step_share_its_cost():
    """A step takes 50 ms and 0.1 ms a token, whatever number of prompts is in it."""
    prompts = Prompts()
    for turn in range(60):
        start, count = turn * 10.0, 1 + turn % 4
        for number in range(count):
            prompts.begin((f"{turn}-{number}", 0), 400, start)
        for number in range(count):
            prompts.done((f"{turn}-{number}", 0), 400, start + 0.05 + 400 * count * 1e-4 + number * 1e-4)
    fixed, slope = prompts.line.terms()
    assert fixed == pytest.approx(0.05, rel=0.15)
    assert slope == pytest.approx(1e-4, rel=0.15)


@pytest.mark.parametrize("size", [300, 1800, 2048, 5000])
def test_full_steps_that_end_in_the_middle_of_a_prompt(size):
    """Ten wait at any time; a step takes 20 ms and 0.06 ms a token, 2,048 of them at most."""
    prompts, limit, begun, now = Prompts(step_limit=2048), 2048, 10, 0.0
    waiting = [size] * 10
    for number in range(10):
        prompts.begin(("x", number), size, now)
    first = 0
    for _ in range(400):
        room, ended = limit, 0
        while room and waiting:
            part = min(room, waiting[0])
            room -= part
            waiting[0] -= part
            if not waiting[0]:
                waiting.pop(0)
                ended += 1
        now += 0.02 + 6e-5 * (limit - room)
        for number in range(first, first + ended):
            prompts.done(("x", number), size, now)
        first += ended
        for _ in range(ended):
            prompts.begin(("x", begun), size, now)
            waiting.append(size)
            begun += 1
    fixed, slope = prompts.line.terms()
    whole_s = 10 * size * (0.02 / limit + 6e-5)  # what waits, in full steps
    assert fixed + slope * 10 * size == pytest.approx(whole_s, rel=0.1)


def test_two_prompts_and_nothing_behind_them():
    """Full steps of 2,048 tokens: the second prompt of 1,800 is done after what is left of it."""
    prompts = Prompts(step_limit=2048)
    for turn in range(30):
        start = 10.0 * turn
        for number in range(2):
            prompts.begin((f"{turn}-{number}", 0), 1800, start)
        prompts.done((f"{turn}-0", 0), 1800, start + 0.02 + 6e-5 * 2048)
        prompts.done((f"{turn}-1", 0), 1800, start + 0.04 + 6e-5 * 3600)
    fixed, slope = prompts.line.terms()
    for tokens in (2048, 3600 - 2048):
        assert fixed + slope * tokens == pytest.approx(0.02 + 6e-5 * tokens, rel=0.03)


def test_the_backlog_shrinks_while_its_first_is_computed():
    prompts = Prompts()
    for turn in range(LEAST + 1):
        prompts.begin(("x", turn), 1000, 2.0 * turn)
        prompts.done(("x", turn), 1000, 2.0 * turn + 1.0)  # a token a millisecond
    prompts.begin(("a", 0), 1000, 10.0)
    prompts.begin(("b", 0), 500, 10.1)
    assert prompts.backlog(10.0) == (2, 1500)
    assert prompts.backlog(10.4) == (2, pytest.approx(1100, abs=2))
    assert prompts.backlog(99.0) == (2, 500)  # late: but the second has not begun
    prompts.drop(("a", 0))
    prompts.drop(("a", 0))
    assert prompts.backlog(10.1) == (1, 500)
    prompts.drop(("b", 0))
    assert prompts.backlog(10.1) == (0, 0)


def test_cached_prompts_say_nothing_of_computing():
    prompts = Prompts()
    for number in range(9):
        prompts.begin(("x", number), 1000, 0.0)
        prompts.done(("x", number), 1, 9.0)
    assert prompts.line.count == 0


def test_steps_by_how_many_run():
    steps = Steps()
    for running in (1, 8, 16, 32) * 50:
        steps.see(running, 0.01 + 0.001 * running)
    steps.see(8, 0.0)
    assert steps.step_s(8) == pytest.approx(0.018, rel=0.05)
    assert steps.sequence_s == pytest.approx(0.001, rel=0.1)

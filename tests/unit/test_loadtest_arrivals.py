"""Open-loop schedules."""

import numpy as np
import pytest

from loadtest.load.arrivals import Shape, drawn
from shared.errors import SettingsError


@pytest.mark.parametrize(
    ("shape", "cv"),
    [
        (Shape(kind="poisson", rate=20.0), 1.0),
        (Shape(kind="gamma", rate=20.0, cv=3.0), 3.0),
        (Shape(kind="gamma", rate=20.0, cv=0.5), 0.5),
        (Shape(kind="constant", rate=20.0), 0.0),
    ],
)
def test_rate_and_burstiness(shape, cv):
    times = drawn(shape, 7, seconds=2000.0, requests=None)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(40_000, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06, abs=1e-6)
    assert times[0] >= 0
    assert times[-1] < 2000.0
    assert (gaps >= 0).all()


@pytest.mark.parametrize(("first", "last"), [(2.0, 40.0), (40.0, 2.0), (10.0, 10.0)])
def test_a_ramp_goes_from_one_rate_to_the_other(first, last):
    times = drawn(Shape(kind="ramp", rate=first, rate_to=last), 7, seconds=1000.0, requests=None)
    counts, _ = np.histogram(times, bins=10, range=(0.0, 1000.0))
    middles = first + (last - first) * (np.arange(10) + 0.5) / 10
    assert counts == pytest.approx(100 * middles, rel=0.2)
    assert times[-1] < 1000.0


def test_equal_seeds_equal_times():
    shape = Shape(kind="gamma", rate=5.0, cv=2.0)
    first, again, other = (drawn(shape, seed, seconds=100.0, requests=None) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_bounds():
    shape = Shape(rate=10.0)
    assert len(drawn(shape, 1, seconds=None, requests=25)) == 25
    assert len(drawn(shape, 1, seconds=1000.0, requests=25)) == 25
    assert drawn(shape, 1, seconds=1.0, requests=1000)[-1] < 1.0
    assert drawn(Shape(kind="constant", rate=2.0), 1, seconds=2.0, requests=None).tolist() == [0.0, 0.5, 1.0, 1.5]


def test_more_seconds_only_add():
    """A longer run begins with the shorter one's schedule, so runs of different lengths compare."""
    shape = Shape(rate=10.0)
    short, long = (drawn(shape, 3, seconds=seconds, requests=None) for seconds in (10.0, 100.0))
    assert long[: len(short)].tolist() == short.tolist()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Shape(rate=0.0), "--rate"),
        (lambda: Shape(rate=float("nan")), "--rate"),
        (lambda: Shape(kind="gamma", rate=1.0, cv=0.0), "--cv"),
        (lambda: Shape(kind="ramp", rate=1.0), "--rate-to"),
        (lambda: Shape(rate=1.0, rate_to=2.0), "--rate-to"),
        (lambda: Shape(kind="ramp", rate=1.0, rate_to=-1.0), "--rate-to"),
        (lambda: drawn(Shape(rate=1.0), 1, seconds=None, requests=None), "--seconds"),
        (lambda: drawn(Shape(kind="ramp", rate=1.0, rate_to=2.0), 1, seconds=None, requests=5), "--seconds"),
        (lambda: drawn(Shape(rate=1e9), 1, seconds=1e9, requests=None), "10,000,000"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, words):
    with pytest.raises(SettingsError, match=words):
        make()

import random

import msgspec
import numpy as np
import pytest

from loadtest.profiling.fit import fit, non_negative
from loadtest.profiling.profile import relative_errors, spread
from loadtest.profiling.steps import Step
from shared.worker.sim.profile import Profile, interpolate

TRUE = Profile(
    name="true",
    model="",
    hardware="",
    source="",
    licence="",
    kv_bytes_per_token=1,
    max_model_len=8192,
    max_running=64,
    token_budget=2048,
    prefill_ms=[(16, 12.0), (128, 30.0), (512, 90.0), (2048, 400.0)],
    decode_ms=[(1, 10.0), (8, 14.0), (32, 40.0)],
    context_prefill_ms=0.0004,
    context_decode_ms=0.003,
    overlap_ms=7.0,
)
PREFILL_KNOTS = [16, 128, 512, 2048]
DECODE_KNOTS = [1, 8, 32]


def measured(count: int, noise: float, disturbed: float, seed: int) -> list[Step]:
    """Random steps that take what TRUE says, within noise; a share of them is disturbed and takes up to four times it."""
    rng = random.Random(seed)
    steps = []
    for number in range(count):
        prefill = [(rng.randint(16, 2048), rng.choice((0, 500, 3000)))] if number % 3 != 1 else []
        sequences = rng.randint(1, 32) if number % 3 else 0
        context = sequences * rng.randint(10, 3000)
        seconds = TRUE.step_s(prefill, (sequences, context)) * (1 + rng.gauss(0, noise))
        seconds *= rng.uniform(1.5, 4) if rng.random() < disturbed else 1
        steps.append(Step(seconds=seconds, prefill=prefill, sequences=sequences, context=context))
    return steps


def fitted(steps: list[Step]) -> Profile:
    return msgspec.structs.replace(TRUE, **msgspec.structs.asdict(fit(steps, PREFILL_KNOTS, DECODE_KNOTS)))


def test_without_noise_every_term_comes_back() -> None:
    found = fitted(measured(200, noise=0, disturbed=0, seed=1))
    for x in (40, 100, 128, 300, 512, 1000, 2000, 3000):
        assert interpolate(found.prefill_ms, x) == pytest.approx(interpolate(TRUE.prefill_ms, x), rel=0.02)
    for x in (1, 4, 8, 20, 32, 50):
        assert interpolate(found.decode_ms, x) == pytest.approx(interpolate(TRUE.decode_ms, x), rel=0.02)
    assert found.context_prefill_ms == pytest.approx(TRUE.context_prefill_ms, rel=0.01)
    assert found.context_decode_ms == pytest.approx(TRUE.context_decode_ms, rel=0.01)
    assert found.overlap_ms == pytest.approx(TRUE.overlap_ms, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_disturbed_steps_do_not_bend_it(seed: int) -> None:
    found = fitted(measured(300, noise=0.05, disturbed=0.15, seed=seed))
    clean = measured(300, noise=0, disturbed=0, seed=100 + seed)
    errors = np.abs(relative_errors(found, clean))
    assert np.median(errors) < 0.03
    assert np.quantile(errors, 0.9) < 0.08


@pytest.mark.parametrize("seed", range(5))
def test_knots_never_fall_however_bad_the_noise(seed: int) -> None:
    found = fitted(measured(30, noise=0.5, disturbed=0.5, seed=seed))  # Profile refuses knots that fall
    assert found.overlap_ms >= 0


def test_knots_go_as_far_as_the_steps() -> None:
    steps = [Step(seconds=0.02 + 0.0001 * tokens, prefill=[(tokens, 0)]) for tokens in (100, 125, 200, 300)] + [
        Step(seconds=0.01, sequences=2, context=10)
    ]
    terms = fit(steps, [1, 64, 128, 256, 512, 1024], [1, 2, 4])
    assert [x for x, _ in terms.prefill_ms] == [100, 128, 300]
    assert [x for x, _ in terms.decode_ms] == [2]


@pytest.mark.parametrize(
    ("rows", "target", "expected"),
    [
        ([[1, 0], [0, 1]], [2, 3], [2, 3]),
        ([[1, 0], [0, 1]], [2, -3], [2, 0]),
        ([[1, 1], [1, 2], [1, 3]], [1, 2, 3], [0, 1]),
        ([[1, 1], [1, 2], [1, 3]], [3, 2, 1], [2, 0]),  # the slope would be negative: the mean is left
        ([[1, 1], [1, 1]], [-1, -1], [0, 0]),
    ],
)
def test_least_squares_without_negatives(rows: list[list[float]], target: list[float], expected: list[float]) -> None:
    assert non_negative(np.array(rows, float), np.array(target, float)) == pytest.approx(expected, abs=1e-9)


def test_spread_compares_only_equal_work() -> None:
    same = [Step(seconds=s, prefill=[(64, 0)]) for s in (0.9, 1.0, 1.1)]
    other = [Step(seconds=s, sequences=1, context=c) for s, c in ((1.0, 10), (9.0, 500), (5.0, 5000))]
    assert spread(same + other) == pytest.approx(0.1)
    assert spread(other) == 0

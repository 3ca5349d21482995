import random

import pytest

from loadtest.profiling.scenarios import Scenario, fits, grid, held_out, shuffled
from loadtest.profiling.steps import EngineFacts
from shared.errors import SettingsError

ENGINES = [
    EngineFacts(max_model_len=4096, max_running=128, token_budget=2048, kv_tokens=60_000, kv_bytes_per_token=1),
    EngineFacts(max_model_len=8192, max_running=16, token_budget=512, kv_tokens=8_192, kv_bytes_per_token=1),
    EngineFacts(max_model_len=1024, max_running=8, token_budget=2048, kv_tokens=2_048, kv_bytes_per_token=1),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_fits_the_engine_and_covers_every_kind(engine: EngineFacts) -> None:
    for scenarios in (grid(engine), held_out(engine, 30, random.Random(1))):
        assert all(fits(scenario, engine) for scenario in scenarios)
        assert any(scenario.arrivals and not scenario.decodes for scenario in scenarios)
        assert any(scenario.decodes and not scenario.arrivals for scenario in scenarios)
        assert any(scenario.decodes and scenario.arrivals for scenario in scenarios)


def test_what_is_held_out_is_not_in_the_grid() -> None:
    engine = ENGINES[0]
    fitted = {length for scenario in grid(engine) for group in scenario.arrivals for length in group}
    for scenario in held_out(engine, 60, random.Random(2)):
        assert not fitted & {length for group in scenario.arrivals for length in group}


def test_a_seed_gives_the_same_work() -> None:
    engine = ENGINES[0]
    assert held_out(engine, 20, random.Random(3)) == held_out(engine, 20, random.Random(3))
    assert held_out(engine, 20, random.Random(3)) != held_out(engine, 20, random.Random(4))


def test_each_repeat_is_the_whole_grid() -> None:
    scenarios = [Scenario(arrivals=((size,),)) for size in range(1, 20)]
    order = shuffled(scenarios, 3, random.Random(5))
    for first in (0, 19, 38):
        part = order[first : first + 19]
        assert sorted(part, key=lambda one: one.arrivals) == scenarios
        assert part != scenarios


def test_an_engine_without_room_is_refused() -> None:
    tiny = EngineFacts(max_model_len=64, max_running=2, token_budget=64, kv_tokens=64, kv_bytes_per_token=1)
    with pytest.raises(SettingsError, match="too few to measure"):
        held_out(tiny, 9, random.Random(6))

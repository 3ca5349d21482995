"""What to ask of an engine so that its steps cover what a profile must know: a fixed grid, and random work to test it.

Invariant: no scenario needs more room than it is given, so nothing is preempted.
"""

import random
from collections.abc import Iterator, Sequence

import msgspec

from loadtest.profiling.steps import EngineFacts
from shared.errors import SettingsError

PREFILL_KNOTS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_KNOTS = (1, 2, 4, 8, 16, 24, 32)
ARRIVALS = ((32,), (128,), (512,), (1500,), (64, 300))  # while others decode
TRIES = 200  # to find a random scenario that fits
BLOCK = 64  # room is counted in whole blocks of the engine, of this size at most


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Sequences begin to decode; then groups of prompts arrive, each when the one before it is computed."""

    decodes: tuple[int, ...] = ()  # prompt tokens of each sequence
    steps: int = 0  # that each of them decodes at least
    arrivals: tuple[tuple[int, ...], ...] = ()  # prompt tokens of each prompt of a group

    @property
    def room(self) -> int:
        """KV tokens held at once, generously."""
        largest = max((sum(length + BLOCK for length in group) for group in self.arrivals), default=0)
        return sum(length + self.longest_output + BLOCK for length in self.decodes) + largest

    @property
    def longest_output(self) -> int:
        """Tokens that a sequence may decode while it waits for the others and for what arrives; the rest is cut."""
        return self.steps + 8 * (len(self.decodes) + 4 * len(self.arrivals))

    @property
    def tokens(self) -> int:
        """Prompt tokens in all, a measure of how long it takes."""
        return sum(self.decodes) + sum(sum(group) for group in self.arrivals)

    @property
    def longest(self) -> int:
        """The longest sequence."""
        lengths = [length + self.longest_output for length in self.decodes]
        return max([*lengths, *(length + 1 for group in self.arrivals for length in group)])


def fits(scenario: Scenario, engine: EngineFacts) -> bool:
    sequences = len(scenario.decodes) + max((len(group) for group in scenario.arrivals), default=0)
    return (
        scenario.longest <= engine.max_model_len
        and scenario.room <= engine.kv_tokens
        and sequences <= engine.max_running
    )


def grid(engine: EngineFacts) -> list[Scenario]:
    """What a profile is fitted to."""
    return [scenario for scenario in _grid(engine) if fits(scenario, engine)]


def _grid(engine: EngineFacts) -> Iterator[Scenario]:
    budget = engine.token_budget
    for size in sorted({*(size for size in PREFILL_KNOTS if size <= budget), *(3 << power for power in range(5, 10))}):
        yield Scenario(arrivals=((size,), (size,)))
    for count, size in ((16, 16), (4, 32), (8, 64), (4, 256), (2, 1024)):
        yield Scenario(arrivals=((size,) * count,) * 2)
    for size in (budget + 500, 2 * budget - 100, engine.max_model_len - 1):  # later chunks have context before them
        if size > budget:
            yield Scenario(arrivals=((size,),))
    for length in (32, 256, 1024, engine.max_model_len - 100):
        for count in DECODE_KNOTS:
            if count * length <= 16 * 1024:
                yield Scenario(decodes=(length,) * count, steps=8)
    arrivals = [group for group in ARRIVALS if max(group) < engine.max_model_len]
    for length, count in ((64, 1), (256, 4), (512, 8), (256, 16)):
        yield Scenario(decodes=(length,) * count, steps=2, arrivals=tuple(arrivals))


def held_out(engine: EngineFacts, count: int, rng: random.Random) -> list[Scenario]:
    """Random lengths and batches that the grid does not have. Raises SettingsError for an engine without room."""
    taken = {length for scenario in grid(engine) for group in scenario.arrivals for length in group}
    makers = (_random_prefill, _random_decode, _random_mixture)
    found: list[Scenario] = []
    tries = iter(range(TRIES * count))
    while len(found) < count:
        if next(tries, None) is None:
            raise SettingsError(
                f"the engine's cache holds {engine.kv_tokens} tokens and a sequence {engine.max_model_len}: "
                "too few to measure; give more --kv-gib or a longer max_model_len"
            )
        scenario = makers[len(found) % len(makers)](engine, rng)
        lengths = {length for group in scenario.arrivals for length in group}
        if fits(scenario, engine) and not lengths & taken:
            found.append(scenario)
    return found


def _random_prefill(engine: EngineFacts, rng: random.Random) -> Scenario:
    most = max(2, min(engine.max_model_len - 2, 2 * engine.token_budget))
    return Scenario(arrivals=tuple(_prompts(rng, rng.choice((1, 1, 1, 2, 3, 5)), most) for _ in range(2)))


def _random_decode(engine: EngineFacts, rng: random.Random) -> Scenario:
    return Scenario(decodes=_prompts(rng, rng.randint(1, 32), engine.max_model_len // 2), steps=8)


def _random_mixture(engine: EngineFacts, rng: random.Random) -> Scenario:
    arrivals = tuple(_prompts(rng, rng.choice((1, 1, 2)), min(engine.max_model_len - 2, 1800)) for _ in range(4))
    return Scenario(decodes=_prompts(rng, rng.randint(1, 20), engine.max_model_len // 4), steps=2, arrivals=arrivals)


def _prompts(rng: random.Random, count: int, most: int) -> tuple[int, ...]:
    """Lengths spread evenly over orders of magnitude, shorter where there are many."""
    most = max(3, most // max(1, count // 4))
    return tuple(round(2 * (most / 2) ** rng.random()) for _ in range(count))


def shuffled(scenarios: Sequence[Scenario], repeats: int, rng: random.Random) -> list[Scenario]:
    """Every scenario `repeats` times, each time all of them in another order: slow spells fall on all alike."""
    return [scenario for _ in range(repeats) for scenario in rng.sample(scenarios, len(scenarios))]

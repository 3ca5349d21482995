"""The choices of a request that repeats, each a request of its own, and whether an engine takes such requests."""

import asyncio
from types import SimpleNamespace

import pytest

from shared import wire
from shared.errors import EngineFailed
from shared.worker.engine import EngineDelta, EngineRequest
from shared.worker.replay import FORCING, FORCING_V2, enable_forcing, one_by_one, together


def config(**more):
    return SimpleNamespace(
        **{"speculative_config": None, "num_speculative_tokens": 0, "use_v2_model_runner": False} | more,
        model_config=SimpleNamespace(logits_processors=["a:B"], return_sampling_mask=False),
    )


@pytest.mark.parametrize(("v2", "name"), [(False, FORCING), (True, FORCING_V2)])
def test_the_processor_comes_behind_the_users_own(v2, name):
    one = config(use_v2_model_runner=v2)
    assert enable_forcing(one)
    assert one.model_config.logits_processors == ["a:B", name]


def test_not_under_speculative_decoding():
    one = config(speculative_config=object(), num_speculative_tokens=3)
    assert not enable_forcing(one)
    assert one.model_config.logits_processors == ["a:B"]


@pytest.mark.parametrize(("seed", "seeds"), [(None, [None, None]), (7, [7, 8])])
def test_each_choice_has_its_seed_and_its_replay(seed, seeds):
    sampling = wire.Sampling(max_tokens=5, n=2, seed=seed)
    request = EngineRequest(id="r", tokens=[1], sampling=sampling, replay=[b"aaaa", b""])
    parts = one_by_one(request)
    assert [one.sampling.seed for one in parts] == seeds
    assert [one.sampling.n for one in parts] == [1, 1]
    assert [one.replay for one in parts] == [[b"aaaa"], [b""]]
    assert len({one.id for one in parts}) == 2


class Engine:
    """Requests that say three tokens, or fail after one, and note how they ended."""

    def __init__(self):
        self.closed = []

    async def choice(self, number, *, fails=False, hangs=False):
        try:
            for token in range(3):
                yield EngineDelta(choice=0, text="", tokens=[token])
                if fails:
                    raise EngineFailed("gone")
                if hangs:
                    await asyncio.Event().wait()
        finally:
            self.closed.append(number)


async def test_deltas_carry_the_number_of_their_choice():
    engine = Engine()
    found = {0: [], 1: []}
    async for delta in together([engine.choice(0), engine.choice(1)]):
        found[delta.choice] += delta.tokens
    assert found == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert sorted(engine.closed) == [0, 1]


async def test_one_that_fails_ends_all():
    engine = Engine()
    with pytest.raises(EngineFailed):
        async for _ in together([engine.choice(0, hangs=True), engine.choice(1, fails=True)]):
            pass
    assert sorted(engine.closed) == [0, 1]


async def test_closing_closes_all():
    engine = Engine()
    deltas = together([engine.choice(0, hangs=True), engine.choice(1, hangs=True)])
    await anext(deltas)
    await anext(deltas)
    await deltas.aclose()
    assert sorted(engine.closed) == [0, 1]

"""What Baton asks of an engine, asked of every one: the same suite over `sim` and a real vLLM, at a real store."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
import pytest_asyncio

from shared import wire
from shared.errors import InvalidRequest
from shared.worker.engine import EngineRequest, KvPlan
from tests.support.engine_bench import BLOCK, CHUNK, MAX_LEN, Bench, prompt_of, running_bench

pytestmark = [pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

OUTPUT = 24
GREEDY = wire.Sampling(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)


def greedy(count: int) -> wire.Sampling:
    return msgspec.structs.replace(GREEDY, max_tokens=count)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["sim", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with running_bench(request.param, tmp_path_factory.mktemp(request.param)) as bench:
        yield bench


# ---- output ---------------------------------------------------------------------------------------------------------


async def test_it_says_what_it_is(bench: Bench) -> None:
    info = bench.writer.info
    assert (info.name, info.max_model_len, info.splits) == (bench.kind, MAX_LEN, True)
    assert info.kv_blocks * BLOCK >= MAX_LEN


async def test_choices_are_numbered_and_each_ends_once(bench: Bench) -> None:
    sampling = wire.Sampling(max_tokens=7, n=3, temperature=1.0, seed=5, ignore_eos=True)
    found = await bench.choices(bench.writer, prompt_of(40), sampling)
    assert sorted(found) == [0, 1, 2]
    for said in found.values():
        assert len(said.tokens) == 7
        assert said.last.finish == wire.Finish(reason="length")
    assert len({tuple(said.tokens) for said in found.values()}) == 3


async def test_the_same_request_gets_the_same_tokens(bench: Bench) -> None:
    first, again = [await bench.say(bench.writer, prompt_of(70), GREEDY) for _ in range(2)]
    assert first.tokens == again.tokens
    assert first.text == again.text == bytes(first.tokens).decode()


async def test_seeds_are_reproducible(bench: Bench) -> None:
    async def with_seed(seed: int) -> list[int]:
        sampling = wire.Sampling(max_tokens=OUTPUT, temperature=1.0, seed=seed, ignore_eos=True)
        return (await bench.say(bench.writer, prompt_of(50), sampling)).tokens

    assert await with_seed(1) == await with_seed(1) != await with_seed(2)


async def test_output_ends_where_the_model_does(bench: Bench) -> None:
    said = await bench.say(bench.reader, prompt_of(MAX_LEN - 3), greedy(50))
    assert len(said.tokens) == 3
    assert said.last.finish == wire.Finish(reason="length")


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_text(bench: Bench, include: bool) -> None:
    whole = (await bench.say(bench.writer, prompt_of(33), GREEDY)).text
    stop = whole[9:12]
    end = whole.index(stop)
    sampling = msgspec.structs.replace(GREEDY, stop=["\n\n", stop], include_stop_str_in_output=include)
    said = await bench.say(bench.writer, prompt_of(33), sampling)
    assert said.text == whole[: end + (len(stop) if include else 0)]
    assert said.last.finish == wire.Finish(reason="stop", stop_reason=stop)


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_token_ends_the_tokens(bench: Bench, include: bool) -> None:
    whole = (await bench.say(bench.writer, prompt_of(33), GREEDY)).tokens
    stop = whole[5]
    count = whole.index(stop) + 1
    sampling = msgspec.structs.replace(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=include)
    said = await bench.say(bench.writer, prompt_of(33), sampling)
    assert said.tokens == whole[:count]
    assert said.text == bytes(whole[: count if include else count - 1]).decode()
    assert said.last.finish == wire.Finish(reason="stop", stop_reason=stop)


async def test_nothing_stops_before_min_tokens(bench: Bench) -> None:
    whole = await bench.say(bench.writer, prompt_of(33), GREEDY)
    by_string = msgspec.structs.replace(GREEDY, stop=[whole.text[2]], min_tokens=10)
    assert len((await bench.say(bench.writer, prompt_of(33), by_string)).tokens) > 10
    by_token = msgspec.structs.replace(GREEDY, stop_token_ids=[whole.tokens[2]], min_tokens=10)
    said = await bench.say(bench.writer, prompt_of(33), by_token)
    assert whole.tokens[2] not in said.tokens[:10]
    assert len(said.tokens) >= 10


async def test_what_cannot_be_is_refused(bench: Bench) -> None:
    for tokens in (prompt_of(MAX_LEN), prompt_of(MAX_LEN + 5), [], [97, 1 << 20]):
        with pytest.raises(InvalidRequest):
            await bench.say(bench.writer, tokens, GREEDY)


# ---- life -----------------------------------------------------------------------------------------------------------


async def test_closing_the_iterator_aborts(bench: Bench) -> None:
    requests = [EngineRequest(id=f"left-{n}", tokens=prompt_of(100, n), sampling=greedy(900)) for n in range(8)]

    async def leave(request: EngineRequest) -> None:
        async with aclosing(bench.writer.generate(request)) as deltas:
            async for _ in deltas:
                return

    await asyncio.gather(*(leave(request) for request in requests))
    await bench.until(lambda: _is_idle(bench), "nothing runs, and no block is held")


def _is_idle(bench: Bench) -> bool:
    load = bench.writer.load()
    return load.running == load.waiting == load.kv_usage == 0


async def test_it_gives_signs_of_life_while_idle(bench: Bench) -> None:
    await bench.writer.check_health()
    assert bench.writer.silent_s() < 30


async def test_speeds_are_measured(bench: Bench) -> None:
    await bench.say(bench.writer, prompt_of(100, 77), greedy(8))
    load = bench.writer.load()
    assert load.decode_step_s > 0
    assert load.computed_prompt_tokens >= 100


# ---- the engine's own cache ------------------------------------------------------------------------------------------


async def test_a_known_prefix_is_not_computed_again(bench: Bench) -> None:
    prefix = prompt_of(5 * BLOCK, 11)
    cold = await bench.say(bench.writer, prefix + prompt_of(10, 1), GREEDY)
    warm = await bench.say(bench.writer, prefix + prompt_of(10, 2), GREEDY)
    assert cold.last.cached_tokens == 0
    assert warm.last.cached_tokens == 5 * BLOCK
    alone = await bench.say(bench.reader, prefix + prompt_of(10, 2), GREEDY)
    assert warm.tokens == alone.tokens


async def test_what_was_said_is_a_prefix_too(bench: Bench) -> None:
    first = await bench.say(bench.writer, prompt_of(50, 12), greedy(60))
    second = prompt_of(50, 12) + first.tokens + prompt_of(9, 13)
    warm = await bench.say(bench.writer, second, GREEDY)
    assert warm.last.cached_tokens == 109 // BLOCK * BLOCK
    assert warm.tokens == (await bench.say(bench.reader, second, GREEDY)).tokens


async def test_salts_do_not_share(bench: Bench) -> None:
    tokens = prompt_of(4 * BLOCK + 1, 14)
    for salt in ("one", "other", ""):
        assert (await bench.say(bench.writer, tokens, GREEDY, salt=salt)).last.cached_tokens == 0
    assert (await bench.say(bench.writer, tokens, GREEDY, salt="one")).last.cached_tokens == 4 * BLOCK


async def test_preemption_changes_no_token(bench: Bench) -> None:
    """Eight streams of 300 tokens want twice the blocks that there are."""
    prompts = [prompt_of(200, 20 + n) for n in range(8)]
    alone = [(await bench.say(bench.reader, prompt, greedy(100))).tokens for prompt in prompts]
    before = bench.writer.load().preemptions
    together = await asyncio.gather(*(bench.say(bench.writer, prompt, greedy(100)) for prompt in prompts))
    assert [said.tokens for said in together] == alone
    assert bench.writer.load().preemptions > before


# ---- a resumed stream repeats what was sent ---------------------------------------------------------------------------

SEEDED = msgspec.structs.replace(GREEDY, temperature=1.0, seed=11)
STATEFUL = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "penalties": msgspec.structs.replace(
        GREEDY, presence_penalty=1.5, frequency_penalty=1.5, repetition_penalty=1.3, temperature=0.8, seed=4
    ),
    "min_tokens": msgspec.structs.replace(SEEDED, min_tokens=OUTPUT - 2, stop_token_ids=list(range(97, 110))),
}
# The sim has no likelihoods.
LIKELY = {
    "bad_words": msgspec.structs.replace(GREEDY, bad_words=["a", "e", "is", "th"]),
    "bias": msgspec.structs.replace(SEEDED, logit_bias={97: 9.0, 98: 9.0}, top_k=5, min_p=0.1),
    "structured": msgspec.structs.replace(SEEDED, structured={"regex": "[a-f]{4}-[0-9]{9}-[x-z]{30}"}),
    "logprobs": msgspec.structs.replace(SEEDED, logprobs=3),
}


async def test_what_follows_a_replay_is_what_would_have_followed(bench: Bench) -> None:
    samplings = STATEFUL | (LIKELY if bench.kind == "vllm" else {})
    for name, sampling in samplings.items():
        whole = await bench.say(bench.reader, prompt_of(70, 80), sampling)
        for sent in (1, 9, OUTPUT - 1, OUTPUT):
            replay = [wire.pack_tokens(whole.tokens[:sent])]
            again = await bench.say(bench.reader, prompt_of(70, 80), sampling, replay=replay)
            assert (again.tokens, again.text) == (whole.tokens, whole.text), f"{name} after {sent}"
            assert again.last.finish == whole.last.finish
            assert again.logprobs == whole.logprobs


async def test_a_replay_is_obeyed(bench: Bench) -> None:
    """Also where the engine would not have chosen the tokens, next to requests that are left alone."""
    other = (await bench.say(bench.reader, prompt_of(45, 81), GREEDY)).tokens
    alone = (await bench.say(bench.reader, prompt_of(70, 80), GREEDY)).tokens
    assert other[:9] != alone[:9]
    forced, free = await asyncio.gather(
        bench.say(bench.reader, prompt_of(70, 80), GREEDY, replay=[wire.pack_tokens(other[:9])]),
        bench.say(bench.reader, prompt_of(70, 80), GREEDY),
    )
    assert forced.tokens[:9] == other[:9]
    assert forced.tokens[9:] != alone[9:]
    assert free.tokens == alone


async def test_every_choice_has_a_replay_of_its_own(bench: Bench) -> None:
    sampling = msgspec.structs.replace(SEEDED, n=3)
    whole = await bench.choices(bench.reader, prompt_of(60, 82), sampling)
    sent = {0: 5, 1: 0, 2: OUTPUT}  # the last one had ended
    replay = [wire.pack_tokens(whole[choice].tokens[:count]) for choice, count in sent.items()]
    again = await bench.choices(bench.reader, prompt_of(60, 82), sampling, replay=replay)
    assert {n: (s.tokens, s.text, s.last.finish) for n, s in again.items()} == {
        n: (s.tokens, s.text, s.last.finish) for n, s in whole.items()
    }


async def test_preemption_does_not_disturb_a_replay(bench: Bench) -> None:
    """Requests come and go in the batch, and half of them repeat tokens that they would not have chosen."""
    prompts = [prompt_of(200, 90 + n) for n in range(8)]
    others = [(await bench.say(bench.reader, prompt_of(30, 90 + n), greedy(60))).tokens for n in range(4)]
    replays = [[wire.pack_tokens(other)] for other in others] + [None] * 4
    pairs = list(zip(prompts, replays, strict=True))
    alone = [(await bench.say(bench.reader, prompt, greedy(100), replay=replay)).tokens for prompt, replay in pairs]
    assert [tokens[:60] for tokens in alone[:4]] == others
    before = bench.writer.load().preemptions
    together = await asyncio.gather(
        *(bench.say(bench.writer, prompt, greedy(100), replay=replay) for prompt, replay in pairs)
    )
    assert [said.tokens for said in together] == alone
    assert bench.writer.load().preemptions > before


async def test_choices_that_repeat_are_aborted_together(bench: Bench) -> None:
    replay = [wire.pack_tokens([97] * 50)] * 2
    sampling = wire.Sampling(max_tokens=900, n=2, temperature=1.0, ignore_eos=True)
    request = EngineRequest(id="left-together", tokens=prompt_of(40), sampling=sampling, replay=replay)
    async with aclosing(bench.writer.generate(request)) as deltas:
        async for _ in deltas:
            break
    await bench.until(lambda: _is_idle(bench), "nothing runs, and no block is held")


# ---- hand-off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CHUNK + 5, 700])
async def test_split_is_exact(bench: Bench, length: int) -> None:
    tokens = prompt_of(length, 30)
    whole = await bench.say(bench.reader, tokens, GREEDY)
    split = await bench.say(bench.reader, tokens, GREEDY, await bench.saved_plan(tokens))
    assert split.tokens == whole.tokens
    last = split.last
    assert (last.computed_tokens, last.loaded_tokens, last.recomputed_tokens) == (1, length - 1, 0)
    assert last.cached_tokens == length - 1


async def test_all_choices_load(bench: Bench) -> None:
    tokens = prompt_of(90, 31)
    sampling = wire.Sampling(max_tokens=OUTPUT, n=3, temperature=1.0, seed=3, ignore_eos=True)
    whole = await bench.choices(bench.reader, tokens, sampling)
    split = await bench.choices(bench.reader, tokens, sampling, await bench.saved_plan(tokens))
    assert {n: said.tokens for n, said in split.items()} == {n: said.tokens for n, said in whole.items()}
    # vLLM tells it of some choices only.
    assert {said.last.computed_tokens for said in split.values()} <= {1, None}


async def test_blocks_of_the_engines_own_cache_reach_the_store(bench: Bench) -> None:
    prefix = prompt_of(4 * BLOCK, 32)
    await bench.say(bench.writer, [*prefix, 97], GREEDY)
    tokens = prefix + prompt_of(20, 33)
    plan = await bench.saved_plan(tokens)
    split = await bench.say(bench.reader, tokens, GREEDY, plan)
    assert split.last.loaded_tokens == len(tokens) - 1
    assert split.tokens == (await bench.say(bench.reader, tokens, GREEDY)).tokens


async def test_many_at_once_are_exact(bench: Bench) -> None:
    rng = random.Random(3)
    prompts = [prompt_of(rng.randrange(1, 300), 40 + n) for n in range(16)]
    whole = [(await bench.say(bench.reader, prompt, GREEDY)).tokens for prompt in prompts]

    async def split(prompt: list[int]) -> list[int]:
        return (await bench.say(bench.reader, prompt, GREEDY, await bench.saved_plan(prompt))).tokens

    assert await asyncio.gather(*(split(prompt) for prompt in prompts)) == whole


async def test_a_loaded_request_may_be_preempted(bench: Bench) -> None:
    prompts = [prompt_of(200, 60 + n) for n in range(8)]
    whole = [(await bench.say(bench.reader, prompt, greedy(100))).tokens for prompt in prompts]
    plans = [await bench.saved_plan(prompt) for prompt in prompts]
    before = bench.writer.load().preemptions
    got = await asyncio.gather(
        *(bench.say(bench.writer, prompt, greedy(100), plan) for prompt, plan in zip(prompts, plans, strict=True))
    )
    assert [said.tokens for said in got] == whole
    assert bench.writer.load().preemptions > before


# ---- the next turn ---------------------------------------------------------------------------------------------------


async def kept_plan(bench: Bench, tokens: list[int], blocks: int) -> KvPlan:
    """To load so many blocks of these tokens, as soon as they are in the store."""
    async with asyncio.timeout(30):
        while True:
            lease, slots = await bench.reserve(tokens[: blocks * BLOCK], write=False)
            if all(slots.committed):
                return bench.plan(lease, slots, save=False)
            await bench.reader_kv.release(lease)


def keeping(plan: KvPlan) -> KvPlan:
    return msgspec.structs.replace(plan, keep=True)


@pytest.mark.parametrize(("prompt", "output"), [(50, 60), (BLOCK, 2 * BLOCK + 1), (3 * BLOCK - 1, 2), (200, 500)])
async def test_the_next_turn_finds_what_was_said(bench: Bench, prompt: int, output: int) -> None:
    first = prompt_of(prompt, 120)
    said = (await bench.say(bench.reader, first, greedy(output), keeping(await bench.saved_plan(first)))).tokens
    blocks = (prompt + output - 1) // BLOCK  # the token sampled last was never computed
    turn = first + said + prompt_of(9, 121)
    split = await bench.say(bench.reader, turn, GREEDY, await kept_plan(bench, turn, blocks))
    assert (split.last.loaded_tokens, split.last.recomputed_tokens) == (blocks * BLOCK, 0)
    assert split.last.computed_tokens == len(turn) - blocks * BLOCK
    assert split.tokens == (await bench.say(bench.reader, turn, GREEDY)).tokens


async def test_much_is_kept_while_pages_are_scarce(bench: Bench) -> None:
    """The writer's pages are given out again as soon as they are free: what it keeps must be copied before."""
    prompts = [prompt_of(200, 130 + n) for n in range(8)]
    whole = [(await bench.say(bench.reader, prompt, greedy(100))).tokens for prompt in prompts]
    plans = [keeping(await bench.saved_plan(prompt)) for prompt in prompts]
    got = await asyncio.gather(
        *(bench.say(bench.writer, prompt, greedy(100), plan) for prompt, plan in zip(prompts, plans, strict=True))
    )
    assert [said.tokens for said in got] == whole
    turns = 0
    for prompt, said in zip(prompts, got, strict=True):
        if said.last.unkept_tokens:
            continue
        turn = [*prompt, *said.tokens, 97]
        split = await bench.say(bench.reader, turn, greedy(8), await kept_plan(bench, turn, 299 // BLOCK))
        assert split.last.loaded_tokens == 299 // BLOCK * BLOCK
        assert split.tokens == (await bench.say(bench.reader, turn, greedy(8))).tokens
        turns += 1
    assert turns, "nothing was kept"
    await bench.until(lambda: _is_idle(bench), "no page is held")


# ---- teeth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2 * BLOCK, 5 * BLOCK + 7])
async def test_wrong_bytes_change_the_text(bench: Bench, length: int) -> None:
    """Sim: one flipped byte. vLLM's numbers may round that away, so there the block is zeroed."""
    tokens = prompt_of(length, 50)
    plan = await bench.saved_plan(tokens)
    clean = (await bench.say(bench.reader, tokens, GREEDY, plan)).tokens
    blocks = len(plan.slots)
    for block in sorted({0, blocks // 2, blocks - 1}):
        filled = (min(BLOCK, length - block * BLOCK)) / BLOCK
        spoil, restore = _spoiler(bench, plan.slots[block], filled)
        spoil()
        spoiled = await bench.say(bench.reader, tokens, GREEDY, plan)
        restore()
        assert spoiled.tokens != clean, f"block {block} of {blocks}"
        assert spoiled.last.recomputed_tokens == 0
    assert (await bench.say(bench.reader, tokens, GREEDY, plan)).tokens == clean


def _spoiler(bench: Bench, slot: int, filled: float):
    path, start, size = bench.arena_slot(slot)
    with path.open("rb") as arena:
        arena.seek(start)
        good = arena.read(size)
    wrong = bytearray(size)
    if bench.kind == "sim":
        wrong[:] = good
        wrong[random.Random(slot).randrange(int(size * filled))] ^= 1 << slot % 8

    def write(content: bytes) -> None:
        with path.open("r+b") as arena:
            arena.seek(start)
            arena.write(content)

    return lambda: write(bytes(wrong)), lambda: write(good)


async def test_a_vanished_slot_is_recomputed_and_counted(bench: Bench) -> None:
    tokens = prompt_of(300, 51)
    plan = await bench.saved_plan(tokens)
    clean = await bench.say(bench.reader, tokens, GREEDY, plan)
    stale = msgspec.structs.replace(plan, words=[w + (2 if n == 3 else 0) for n, w in enumerate(plan.words)])
    again = await bench.say(bench.reader, tokens, GREEDY, stale)
    assert again.tokens == clean.tokens
    assert again.last.recomputed_tokens == 299 - 3 * BLOCK
    assert again.last.loaded_tokens == again.last.cached_tokens == 3 * BLOCK
    assert again.last.computed_tokens == 300 - 3 * BLOCK


async def test_loads_within_a_step_and_beside_it(bench: Bench) -> None:
    """More at once than one step may load; of each kind one finds a block gone."""
    prompts = [prompt_of(MAX_LEN - 100 - n, 55 + n) for n in range(4)]
    plans = [await bench.saved_plan(prompt) for prompt in prompts]
    clean = [
        (await bench.say(bench.reader, prompt, GREEDY, plan)).tokens
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    for number in (0, 3):
        words = [word + (2 if block == 9 else 0) for block, word in enumerate(plans[number].words)]
        plans[number] = msgspec.structs.replace(plans[number], words=words)
    got = await asyncio.gather(
        *(bench.say(bench.reader, prompt, GREEDY, plan) for prompt, plan in zip(prompts, plans, strict=True))
    )
    assert [said.tokens for said in got] == clean
    assert [said.last.loaded_tokens for said in got] == [9 * BLOCK, *(len(one) - 1 for one in prompts[1:3]), 9 * BLOCK]
    assert [said.last.computed_tokens for said in got] == [
        len(prompt) - said.last.loaded_tokens for prompt, said in zip(prompts, got, strict=True)
    ]


async def test_a_lost_arena_is_recomputed(bench: Bench) -> None:
    tokens = prompt_of(100, 52)
    plan = await bench.saved_plan(tokens)
    clean = await bench.say(bench.reader, tokens, GREEDY, plan)
    gone = KvPlan(arena="gone", lease=plan.lease, slots=plan.slots, words=plan.words, load=plan.load)
    again = await bench.say(bench.reader, tokens, GREEDY, gone)
    assert again.tokens == clean.tokens
    assert again.last.recomputed_tokens == 99


async def test_leaving_during_a_load_frees_everything(bench: Bench) -> None:
    prompts = [prompt_of(900, 70 + n) for n in range(4)]  # one of them may be loaded within a step
    plans = [await bench.saved_plan(prompt) for prompt in prompts]

    async def leave(number: int) -> None:
        request = EngineRequest(id=f"gone-{number}", tokens=prompts[number], sampling=GREEDY, kv=plans[number])
        task = asyncio.ensure_future(anext(bench.writer.generate(request)))
        await asyncio.sleep(0)  # it has reached the engine, and no more
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(leave(number) for number in range(4)))
    await bench.until(lambda: _is_idle(bench), "nothing runs, and no block is held")

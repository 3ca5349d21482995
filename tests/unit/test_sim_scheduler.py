"""Batching, admission and preemption, step by step; every rule is one of vLLM's v1 scheduler."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kv.copy_planner import CopyPlanner
from shared.worker.engine import KvPlan
from shared.worker.sim.blocks import BlockPool
from shared.worker.sim.contents import Contents
from shared.worker.sim.scheduler import Scheduler, SchedulerLimits, Sequence, Step

BLOCK = 4


@dataclass
class Bench:
    blocks: int = 32
    running: int = 8
    budget: int = 16
    caching: bool = True
    in_step: int = 0  # blocks that may be loaded within a step
    output: dict[str, int] = field(default_factory=dict)  # tokens that each sequence is to get

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.blocks)
        self.planner = CopyPlanner(BLOCK, keep_limit=0, in_step_limit=self.in_step)
        self.contents = Contents("test", BLOCK)
        limits = SchedulerLimits(max_running=self.running, token_budget=self.budget, prefix_caching=self.caching)
        self.scheduler = Scheduler(limits, self.pool, self.planner, self.contents)
        self.sequences: dict[str, Sequence] = {}
        self.ended: list[str] = []

    def add(self, name: str, prompt: int, output: int = 1, *, first: int = 0, plan: KvPlan | None = None) -> Sequence:
        """A prompt of the numbers from `first` on."""
        tokens = list(range(first, first + prompt))
        sequence = Sequence(name, tokens, self.contents.read(tokens), 0)
        self.planner.track(name, plan, prompt)
        self.scheduler.add(sequence)
        self.sequences[name], self.output[name] = sequence, output
        return sequence

    def step(self, bad: int | None = None) -> Step:
        """Schedule, load within the step all but the page `bad`, and sample what the step completes."""
        step = self.scheduler.schedule()
        if in_step := {load.request for load in step.copies.loads if load.in_step}:
            self.scheduler.loaded_in_step(step, in_step, set() if bad is None else {bad})
        for save in step.copies.saves:
            self.scheduler.saved(save)
        for sequence in [*step.decodes, *(chunk.sequence for chunk in step.chunks if chunk.completes)]:
            sequence.tokens.append(1000 + len(sequence.tokens))
            if len(sequence.tokens) - sequence.prompt_tokens == self.output[sequence.id]:
                self.scheduler.end(sequence)
                self.ended.append(sequence.id)
        return step


def shown(step: Step) -> list[str]:
    return [f"{c.sequence.id} {c.start}-{c.end}" for c in step.chunks] + [s.id for s in step.decodes]


def plan_of(prompt: int, *, load: int = 0, save: bool = False) -> KvPlan:
    blocks = -(-prompt // BLOCK)
    return KvPlan(
        arena="a",
        lease="l",
        slots=list(range(blocks)),
        words=[2] * blocks,
        load=load,
        save=save,
        write=[True] * blocks if save else [],
    )


def test_running_first_then_who_waits_in_chunks_of_what_is_left() -> None:
    bench = Bench(budget=10)
    bench.add("a", 6, output=5, first=0)
    bench.add("b", 13, output=2, first=100)
    bench.add("c", 3, output=1, first=200)
    assert [shown(bench.step()) for _ in range(4)] == [
        ["a 0-6", "b 0-4"],
        ["b 4-13", "a"],  # a decodes first: b gets the nine that it leaves
        ["c 0-3", "a", "b"],
        ["a"],
    ]


def test_no_more_run_than_may() -> None:
    bench = Bench(running=2)
    for name in "abc":
        bench.add(name, 2, output=2, first=ord(name) * 10)
    assert [shown(bench.step()) for _ in range(4)] == [["a 0-2", "b 0-2"], ["a", "b"], ["c 0-2"], ["c"]]
    assert bench.scheduler.is_idle


def test_a_prompt_that_does_not_fit_as_a_whole_is_not_begun() -> None:
    bench = Bench(blocks=6)
    bench.add("a", 12, output=3, first=0)
    bench.add("b", 16, first=100)
    bench.add("c", 1, first=200)
    assert shown(bench.step()) == ["a 0-12"]  # b needs four blocks of the three left; c stays behind it
    assert bench.scheduler.waiting == 2
    bench.step()
    bench.step()
    assert shown(bench.step()) == ["b 0-16"]


def test_the_latest_is_preempted_and_comes_back_first_with_what_it_has() -> None:
    bench = Bench(blocks=4, caching=False)
    bench.add("a", 7, output=6, first=0)
    bench.add("b", 7, output=3, first=100)
    bench.add("c", 1, first=200)
    assert shown(bench.step()) == ["a 0-7", "b 0-7"]
    assert shown(bench.step()) == ["a", "b"]  # each fills its two blocks
    step = bench.step()
    assert (shown(step), step.preempted) == (["a"], 1)  # its third block was b's; nobody is admitted in such a step
    assert bench.sequences["b"].computed == 0
    while "a" not in bench.ended:
        assert "b" not in [s.id for s in bench.scheduler.running]
        bench.step()
    assert shown(bench.step())[0] == "b 0-9"  # the prompt and the two tokens that it had
    assert bench.pool.free == 4


def test_who_catches_up_does_so_in_chunks_however_small() -> None:
    """So its prompt's pages are looked at again before it goes on."""
    bench = Bench(blocks=5, caching=False, budget=7)
    bench.add("a", 7, output=9, first=0)
    bench.add("b", 7, output=3, first=100)
    while "a" not in bench.ended:
        bench.step()
    assert len(bench.sequences["b"].tokens) == 9
    bench.scheduler._limits = SchedulerLimits(max_running=8, token_budget=8)
    assert [shown(bench.step()) for _ in range(2)] == [["b 0-8"], ["b 8-9"]]


def test_a_known_prefix_is_not_computed_again() -> None:
    bench = Bench()
    bench.add("a", 10, first=0)
    assert shown(bench.step()) == ["a 0-10"]
    again = bench.add("b", 10, first=0)
    assert shown(bench.step()) == ["b 8-10"]
    assert again.cached == 8
    whole = bench.add("c", 8, first=0)
    assert shown(bench.step()) == ["c 4-8"]  # the last token's block is computed in any case
    assert whole.cached == 4


def test_equal_prompts_share_within_a_step() -> None:
    bench = Bench(budget=100)
    for name in "abc":
        bench.add(name, 9, output=2, first=0)
    assert shown(bench.step()) == ["a 0-9", "b 8-9", "c 8-9"]
    assert bench.pool.free == 32 - 2 - 3


def test_another_salt_is_another_prefix() -> None:
    bench = Bench()
    bench.add("a", 10, first=0)
    bench.step()
    salted = bench.add("b", 10, first=0)
    salted.salt = 99
    assert shown(bench.step()) == ["b 0-10"]


def test_a_load_takes_its_blocks_and_waits_beside_the_queue() -> None:
    bench = Bench()
    loading = bench.add("a", 10, output=2, first=0, plan=plan_of(10, load=3))
    bench.add("b", 3, first=100)
    step = bench.step()
    assert shown(step) == ["b 0-3"]
    (load,) = step.copies.loads
    assert [page.block for page in load.pages] == [0, 1, 2]
    assert bench.scheduler.waiting == 1
    bench.scheduler.loaded("a", set())
    assert [bench.pool.fills[block] for block in loading.blocks] == [4, 4, 2]
    assert shown(bench.step()) == ["a 9-10"]
    assert loading.cached == 9
    assert bench.scheduler.end(loading) == {
        "loaded_tokens": 9,
        "recomputed_tokens": 0,
        "computed_tokens": 1,
        "unkept_tokens": 0,
    }


def test_a_failed_load_is_computed_from_the_first_bad_block_on() -> None:
    bench = Bench()
    loading = bench.add("a", 10, output=2, first=0, plan=plan_of(10, load=3))
    bench.step()
    bench.scheduler.loaded("a", {loading.blocks[1]})
    assert [bench.pool.fills[block] for block in loading.blocks] == [4, 0, 0]
    assert shown(bench.step()) == ["a 4-10"]
    assert bench.scheduler.end(loading) == {
        "loaded_tokens": 4,
        "recomputed_tokens": 5,
        "computed_tokens": 6,
        "unkept_tokens": 0,
    }


def test_a_load_that_failed_altogether_begins_anew() -> None:
    bench = Bench()
    loading = bench.add("a", 10, output=2, first=0, plan=plan_of(10, load=3))
    bench.step()
    bench.scheduler.loaded("a", set(loading.blocks))
    assert bench.pool.free == 32
    assert shown(bench.step()) == ["a 0-10"]


def test_a_small_load_is_computed_on_in_its_own_step() -> None:
    bench = Bench(in_step=4)
    loading = bench.add("a", 10, output=2, first=0, plan=plan_of(10, load=3))
    bench.add("b", 10, output=2, first=100, plan=plan_of(10, load=3))
    step = bench.step()
    assert shown(step) == ["a 9-10"]
    assert [load.in_step for load in step.copies.loads] == [True, False]  # four pages a step, and b needs three
    assert [bench.pool.fills[block] for block in loading.blocks] == [4, 4, 2]
    assert bench.scheduler.end(loading) == {
        "loaded_tokens": 9,
        "recomputed_tokens": 0,
        "computed_tokens": 1,
        "unkept_tokens": 0,
    }
    bench.scheduler.loaded("b", set())
    assert shown(bench.step()) == ["b 9-10"]


def test_what_a_load_within_a_step_did_not_fill_is_computed_in_that_step() -> None:
    bench = Bench(in_step=8, blocks=8)
    good = bench.add("a", 10, output=2, first=0, plan=plan_of(10, load=3))
    loading = bench.add("b", 10, output=2, first=100, plan=plan_of(10, load=3))
    step = bench.step(bad=4)  # pages are taken in order, so that is the second of b
    assert loading.blocks[1] == 4
    assert shown(step) == ["a 9-10", "b 4-10"]
    assert [bench.pool.fills[block] for block in loading.blocks] == [4, 0, 0]  # until it is computed
    assert (good.cached, loading.cached) == (9, 4)
    assert bench.scheduler.end(loading) == {
        "loaded_tokens": 4,
        "recomputed_tokens": 5,
        "computed_tokens": 6,
        "unkept_tokens": 0,
    }
    assert bench.scheduler.end(good)["recomputed_tokens"] == 0


def test_who_leaves_during_a_load_keeps_its_blocks_until_it_has_ended() -> None:
    bench = Bench()
    loading = bench.add("a", 10, first=0, plan=plan_of(10, load=3))
    bench.step()
    bench.scheduler.end(loading)
    assert bench.scheduler.waiting == 0
    assert bench.pool.free == 29
    bench.scheduler.loaded("a", set())
    assert bench.pool.free == 32
    assert bench.scheduler.is_idle


def test_a_load_leaves_room_for_prompts_that_are_being_computed() -> None:
    bench = Bench(blocks=10, budget=4)
    bench.add("a", 20, first=0)
    assert shown(bench.step()) == ["a 0-4"]
    bench.add("b", 24, first=100, plan=plan_of(24, load=6))
    step = bench.step()
    assert not step.copies.loads  # nine are free, but four of them are promised to a
    assert shown(step) == ["a 4-8"]


def test_blocks_are_saved_in_the_step_that_completes_them_and_held_meanwhile() -> None:
    bench = Bench(budget=6)
    bench.add("a", 10, first=0, plan=plan_of(10, save=True))
    steps = [bench.scheduler.schedule() for _ in range(2)]
    (first,), (second,) = (step.copies.saves for step in steps)
    assert [page.block for page in first.pages] == [0]
    assert [page.block for page in second.pages] == [1, 2]
    sequence = bench.sequences["a"]
    bench.scheduler.end(sequence)
    assert bench.pool.free == 29
    bench.scheduler.saved(first)
    bench.scheduler.saved(second)
    assert bench.pool.free == 32


work = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.sampled_from(["", "save", "load"]))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(work, min_size=1, max_size=12), st.integers(8, 14), st.integers(1, 30), st.booleans(), st.integers(0, 8)
)
def test_whatever_comes_all_get_their_tokens_and_nothing_is_left(
    works: list[tuple[int, int, int, str]], blocks: int, budget: int, caching: bool, in_step: int
) -> None:
    bench = Bench(blocks=blocks, budget=budget, caching=caching, running=4, in_step=in_step)
    for number, (prompt, output, first, what) in enumerate(works):
        plan = plan_of(prompt, load=-(-prompt // BLOCK) if what == "load" else 0, save=what == "save") if what else None
        bench.add(str(number), prompt, output, first=first, plan=plan)
    for _ in range(2000):
        if bench.scheduler.is_idle:
            break
        step = bench.step()
        tokens = sum(chunk.end - chunk.start for chunk in step.chunks) + len(step.decodes)
        assert tokens <= budget
        assert len(bench.scheduler.running) <= 4
        for sequence in bench.scheduler.running:
            assert len(sequence.blocks) * BLOCK >= sequence.computed
        for number, load in enumerate(load for load in step.copies.loads if not load.in_step):
            bench.scheduler.loaded(load.request, {load.pages[-1].block_id} if number % 2 else set())
    assert sorted(bench.ended, key=int) == [str(number) for number in range(len(works))]
    assert bench.pool.free == blocks

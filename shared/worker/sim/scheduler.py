"""What the sim computes in each step: continuous batching as vLLM's v1 scheduler does it (vllm/v1/core/sched).

Running sequences first, in order of admission; then those whose blocks have been loaded; then those that wait, first
come first served. Prompts are computed in chunks that fit what the step's budget leaves. A sequence is admitted only
when the whole of it, as far as it is known, fits the free blocks. When a running one finds no block, the latest
admitted is preempted: its blocks go back, and it is computed anew from its prompt and the tokens that it has.

Pure: no time, no bytes. Invariants: a sequence holds its blocks until it ends, is preempted, or, when it ends during a
load, until that load has ended; blocks that are being saved stay held until `saved`; no token is computed twice
without a preemption or a failed load.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from shared import wire
from shared.kv.copies import Save, StepPlan
from shared.kv.copy_planner import CopyPlanner
from shared.worker.sim.blocks import BlockPool
from shared.worker.sim.contents import Contents, Reading


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    max_running: int
    token_budget: int  # tokens a step
    prefix_caching: bool = True


class Sequence:
    """One choice of a request: its tokens so far, and the blocks that hold their KV."""

    __slots__ = (
        "blocks",
        "cached",
        "computed",
        "has_ended",
        "hits",
        "id",
        "is_decoding",
        "named",
        "preemptions",
        "prompt_tokens",
        "reading",
        "salt",
        "seeds",
        "tokens",
    )

    def __init__(self, sequence_id: str, tokens: list[int], reading: Reading, salt: int) -> None:
        self.id = sequence_id
        self.tokens = tokens  # the prompt's, then what was sampled
        self.prompt_tokens = len(tokens)
        self.reading = reading  # of the prompt, or of more after a preemption
        self.salt = salt
        self.seeds = list(reading.seeds)
        self.blocks: list[int] = []
        self.computed = 0  # tokens that have KV
        self.hits = 0  # leading blocks that were there already when it was admitted
        self.named = 0  # leading blocks that others may hit
        self.cached = 0  # prompt tokens that were not computed when first admitted
        self.preemptions = 0
        self.is_decoding = False  # its prompt, and what it had before a preemption, is computed
        self.has_ended = False


@dataclass(slots=True)
class Chunk:
    """Tokens start … end-1 of a sequence that are not the one sampled last."""

    sequence: Sequence
    blocks: list[int]  # the sequence's own list, which it leaves behind when it gives them up
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """A token is sampled behind it."""
        return self.end == len(self.sequence.tokens)


@dataclass(slots=True)
class Step:
    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)  # each computes the token that it sampled last
    hits: list[tuple[Reading, list[int]]] = field(default_factory=list)  # blocks that were there already, and of what
    copies: StepPlan = field(default_factory=StepPlan)
    preempted: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.chunks or self.decodes)


class Scheduler:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool, planner: CopyPlanner, contents: Contents) -> None:
        self.running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._loaded: deque[Sequence] = deque()
        self._loading: dict[str, Sequence] = {}
        self._limits = limits
        self._pool = pool
        self._planner = planner
        self._contents = contents
        self._size = contents.block_size

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._loaded) + sum(not s.has_ended for s in self._loading.values())

    @property
    def is_idle(self) -> bool:
        return not (self.running or self._waiting or self._loaded or self._loading)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step; what it computes counts as computed from here on."""
        step = Step()
        budget = self._schedule_running(step, self._limits.token_budget)
        if not step.preempted:
            self._admit(step, budget)
        chunks = [(chunk.sequence.id, chunk.start, chunk.end) for chunk in step.chunks]
        held = {chunk.sequence.id: chunk.sequence for chunk in step.chunks}
        step.copies = self._planner.plan_step(chunks, lambda name: held[name].blocks, idle=step.is_empty)
        for save in step.copies.saves:
            self._pool.begin_copy(page.block_id for page in save.pages)
        return step

    def repeats(self, step: Step) -> int:
        """How many next steps are of the very same decodes; 0: `schedule` has something to see to first."""
        running, size = self.running, self._size
        if step.chunks or self._waiting or self._loaded or not running or len(running) != len(step.decodes):
            return 0
        return min([1 + len(sequence.blocks) * size - len(sequence.tokens) for sequence in running])

    def repeated(self, sequence: Sequence) -> None:
        """Such steps have computed all of its tokens but the last one."""
        sequence.computed = end = len(sequence.tokens) - 1
        if end // self._size > sequence.named:
            self._name_blocks(sequence)

    def end(self, sequence: Sequence) -> dict[str, int]:
        """Finished or given up, in whatever state. Returns the planner's account of it; empty if it had no plan."""
        sequence.has_ended = True
        account = self._planner.finished(sequence.id) or {}
        if sequence.id in self._loading:
            return account  # the copy may still run; its blocks come back with `loaded`
        for queue in (self.running, self._waiting, self._loaded):
            if sequence in queue:
                queue.remove(sequence)
                break
        self._release(sequence)
        return account

    def loaded(self, sequence_id: str, invalid: set[int]) -> None:
        """A load has ended; these blocks could not be filled, so from the first of them on all is computed.

        Not to be called while a step is computed: hits may be filled in it.
        """
        sequence = self._loading.pop(sequence_id)
        self._planner.loads_ended((sequence_id,), invalid)
        if sequence.has_ended:
            self._release(sequence)
            return
        good = sequence.computed = self._fill(sequence, sequence.computed, invalid)
        if good:
            self._name_blocks(sequence)
            self._loaded.append(sequence)
        else:
            self._release(sequence)
            self._waiting.appendleft(sequence)

    def loaded_in_step(self, step: Step, sequence_ids: set[str], invalid: set[int]) -> None:
        """The loads within this step have ended: what could not be filled is computed in it, too."""
        self._planner.loads_ended((), invalid)
        for chunk in step.chunks:
            if chunk.sequence.id in sequence_ids:
                start, chunk.start = chunk.start, self._fill(chunk.sequence, chunk.start, invalid)
                if chunk.start < start:
                    self._planner.computed_more(chunk.sequence.id, chunk.end - chunk.start)

    def _fill(self, sequence: Sequence, end: int, invalid: set[int]) -> int:
        """Its blocks up to token `end` but for the hits were loaded. Returns up to where without a gap."""
        size, good = self._size, end
        for block in range(sequence.hits, self._blocks_of(end)):
            block_id, start = sequence.blocks[block], block * size
            if block_id in invalid:
                good = min(good, start)
            self._pool.fills[block_id] = min(size, sequence.prompt_tokens - start) if start < good else 0
        sequence.cached = min(sequence.cached, good)
        return good

    def saved(self, save: Save) -> None:
        self._pool.end_copy(page.block_id for page in save.pages)

    # ---- running ---------------------------------------------------------------------------------------------

    def _schedule_running(self, step: Step, budget: int) -> int:
        """Returns what is left of the budget."""
        running, size, at = self.running, self._size, 0
        while at < len(running) and budget > 0:
            sequence = running[at]
            start = sequence.computed
            end = min(len(sequence.tokens), start + budget)
            if end > len(sequence.blocks) * size and not self._make_room(step, sequence, end):
                break  # it was preempted itself, and everybody behind it
            sequence.computed = end
            budget -= end - start
            if sequence.is_decoding:
                step.decodes.append(sequence)
            else:
                self._add_chunk(step, sequence, start)
            if end // size > sequence.named:
                self._name_blocks(sequence)
            at += 1
        return budget

    def _make_room(self, step: Step, sequence: Sequence, end: int) -> bool:
        """Blocks up to token `end`, if need be those of whoever was admitted last. False: it was the last itself."""
        while (missing := self._blocks_of(end) - len(sequence.blocks)) > self._pool.free:
            victim = self.running.pop()
            self._preempt(victim)
            step.preempted += 1
            if victim is sequence:
                return False
        sequence.blocks += self._pool.take(missing)
        return True

    def _add_chunk(self, step: Step, sequence: Sequence, start: int) -> None:
        chunk = Chunk(sequence, sequence.blocks, start, sequence.computed)
        sequence.is_decoding = chunk.completes
        step.chunks.append(chunk)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.is_decoding = False
        sequence.computed = 0
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.named = 0

    # ---- admission -------------------------------------------------------------------------------------------

    def _admit(self, step: Step, budget: int) -> None:
        while budget > 0 and len(self.running) < self._limits.max_running:
            if self._loaded:
                sequence = self._loaded[0]
                if not self._fits(sequence, sequence.blocks, held=True):
                    break
                self._loaded.popleft()
            elif self._waiting:
                sequence = self._waiting[0]
                if not self._begin(step, sequence):
                    break
                self._waiting.popleft()
                if sequence.id in self._loading:
                    continue
            else:
                break
            start = sequence.computed
            end = min(len(sequence.tokens), start + budget)
            sequence.blocks += self._pool.take(max(0, self._blocks_of(end) - len(sequence.blocks)))
            sequence.computed = end
            budget -= end - start
            self.running.append(sequence)
            self._add_chunk(step, sequence, start)
            self._name_blocks(sequence)

    def _begin(self, step: Step, sequence: Sequence) -> bool:
        """Give it the blocks that are there already, and begin to load what the store has. False: no room."""
        if sequence.preemptions and len(sequence.tokens) > len(sequence.reading.states):
            sequence.reading = self._contents.read(sequence.tokens)
            sequence.seeds = list(sequence.reading.seeds)
        hits = self._pool.find(self._names(sequence)) if self._limits.prefix_caching else []
        local = len(hits) * self._size
        external = self._planner.matched_tokens(sequence.id, len(sequence.tokens), local)
        if not self._fits(sequence, hits, held=False):
            return False
        missing = self._blocks_of(local + external) - len(hits) if external else 0
        if missing + self._pool.free_among(hits) > self._pool.free - (self._promised() if external else 0):
            return False
        self._pool.hold(hits)
        sequence.blocks = hits + self._pool.take(missing)
        sequence.computed = local + external
        sequence.named = sequence.hits = len(hits)
        if not sequence.preemptions:
            sequence.cached = local + external
        if hits:
            step.hits.append((sequence.reading, hits))
        if external and not self._planner.allocated(sequence.id, sequence.blocks, len(sequence.tokens), external):
            self._loading[sequence.id] = sequence
        return True

    def _fits(self, sequence: Sequence, blocks: list[int], *, held: bool) -> bool:
        """Whether all that is known of it fits; so a long prompt is not begun that cannot be ended."""
        missing = self._blocks_of(len(sequence.tokens)) - len(blocks)
        return missing + (0 if held else self._pool.free_among(blocks)) <= self._pool.free

    def _promised(self) -> int:
        """Blocks that sequences in the middle of their prompt still need: a load must not take those."""
        return sum(max(0, self._blocks_of(len(s.tokens)) - len(s.blocks)) for s in self._unfinished())

    def _unfinished(self) -> Iterator[Sequence]:
        yield from self._loading.values()
        yield from self._loaded
        yield from (sequence for sequence in self.running if sequence.computed < len(sequence.tokens))

    # ---- names -----------------------------------------------------------------------------------------------

    def _names(self, sequence: Sequence) -> Iterator[int]:
        """Of its full blocks but for the last token's: that one is always computed."""
        for block in range((len(sequence.tokens) - 1) // self._size):
            yield self._name(sequence, block)

    def _name(self, sequence: Sequence, block: int) -> int:
        seeds, size = sequence.seeds, self._size
        while len(seeds) <= block + 1:
            start = (len(seeds) - 1) * size
            seeds.append(self._contents.next_seed(seeds[-1], wire.pack_tokens(sequence.tokens[start : start + size])))
        return seeds[block + 1] ^ sequence.salt

    def _name_blocks(self, sequence: Sequence) -> None:
        """What is computed, or will be by the end of this step, may be hit by others."""
        full = sequence.computed // self._size
        if not self._limits.prefix_caching:
            sequence.named = full
            return
        for block in range(sequence.named, full):
            if self._pool.is_copied(sequence.blocks[block]):
                break  # whoever hits it may have to fill it up, see pages.py
            self._pool.name(sequence.blocks[block], self._name(sequence, block))
            sequence.named = block + 1

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._size)

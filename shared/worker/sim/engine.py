"""The sim engine: steps of the scheduler, each as long as the profile says, in this process and on its loop.

What is true: batching, chunks, blocks, preemption and prefix hits; the KV bytes, their way through the store, and that
every token depends on them. What is modelled: how long a step takes. `speed` divides that; at infinity nobody sleeps.
Invariants: a step's tokens go out when the step ends, at most one a choice (at infinite speed some steps later, in one
delta); deltas go out when what their request had
to save is in the store, and what it loaded within a step was counted there; ended copies are taken in between steps
only.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from typing import Any, Self

import msgspec
import xxhash
from prometheus_client import CollectorRegistry

from shared.errors import EngineFailed, SettingsError
from shared.kv.copies import KeepCopy, Load, Save, StepPlan
from shared.kv.copy_planner import IN_STEP_BYTES, CopyPlanner
from shared.kv.messages import Loaded
from shared.kv.rank_client import RankClient
from shared.model_files import model_folder, read_tokenizer, vocabulary_size
from shared.worker.engine import EngineDelta, EngineInfo, EngineLoad, EngineRequest
from shared.worker.liveness import Liveness
from shared.worker.sim.arguments import SimShape, resolve
from shared.worker.sim.blocks import BlockPool
from shared.worker.sim.choice import Choice, DeltaStream, refuse
from shared.worker.sim.contents import MASK, Contents
from shared.worker.sim.copying import Copied, CopyThread
from shared.worker.sim.counts import SimCounts
from shared.worker.sim.pages import DigestPages, SimPages, SlicePages
from shared.worker.sim.scheduler import Scheduler, SchedulerLimits, Step
from shared.worker.sim.text import TokenTable

log = logging.getLogger(__name__)

INLINE_BYTES = 1 << 20  # more are written and read in a thread: other tasks of the loop wait no longer than this takes
CATCH_UP_S = 0.1  # steps that are further behind do not make up for it: the time is lost, and counted
SIGN_S = 1.0
TURN_S = 0.001  # at infinite speed the loop's other tasks have their turn so often, not in each step
REPEATS = 16  # steps at once, some 10 µs a sequence
TURNS = 3  # of the loop: a delta's reader, the batch that its row goes into, the bus
HELD_SHARE = 8  # one page in so many may be held for requests that have ended
DEFAULT_KV_BYTES = 1 << 29


class SimSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs of a worker's settings."""

    model: str
    revision: str = ""
    args: dict[str, Any] = {}
    kv_bytes: int = 0  # of its own KV memory; 0: enough for a start
    kv_socket: str = ""
    session: str = ""
    worker: str = ""
    speed: float = 1.0  # math.inf: no sleeping at all
    has_kv: bool = True


class SimEngine:
    """See shared/worker/engine.py for the protocol. Use `start`."""

    def __init__(
        self,
        shape: SimShape,
        contents: Contents,
        table: TokenTable,
        pool: BlockPool,
        registry: CollectorRegistry,
        *,
        speed: float,
    ) -> None:
        self._shape = shape
        self._speed = speed
        self._contents = contents
        self._table = table
        self._pool = pool
        in_step_limit = IN_STEP_BYTES // shape.block_bytes
        self._planner = CopyPlanner(shape.block_size, keep_limit=pool.count // HELD_SHARE, in_step_limit=in_step_limit)
        limits = SchedulerLimits(
            max_running=shape.max_running, token_budget=shape.token_budget, prefix_caching=shape.prefix_caching
        )
        self._scheduler = Scheduler(limits, pool, self._planner, contents)
        self._pages: SimPages = (
            SlicePages(pool.fills, shape.block_size, shape.token_bytes)
            if shape.has_kv
            else DigestPages(pool.fills, shape.block_size)
        )
        self._copies: CopyThread | None = None
        self._copied: list[Copied] = []
        self._telling: dict[str, int] = {}  # by lease: saves under way, and loads that the store is still to hear of
        self._held: dict[str, list[tuple[DeltaStream, EngineDelta]]] = {}  # deltas, by the lease that they wait for
        self._streams: set[DeltaStream] = set()
        self._counts = SimCounts(registry)
        self._liveness = Liveness(time.monotonic())
        self._wake = asyncio.Event()
        self._due_s = 0.0  # when the last step was to end
        self._sampled: list[Choice] = []  # their latest tokens are in no delta yet
        self._turn_s = 0.0  # when the loop's other tasks are due, at infinite speed
        self._ended_s: float | None = None  # when the last step ended; None after a pause
        self._loop: asyncio.Task[None] | None = None
        self._failure: EngineFailed | None = None

    @classmethod
    async def start(cls, settings: SimSettings, registry: CollectorRegistry) -> Self:
        """A second or less. Raises SettingsError, or KvLost and KvMismatch when the store does not take it."""
        shape = resolve(settings.args, has_kv=settings.has_kv)
        folder = model_folder(settings.model, settings.revision)
        tokenizer = read_tokenizer(folder, settings.model)
        vocabulary = vocabulary_size(folder, tokenizer)
        contents = Contents(shape.fingerprint(settings.model, vocabulary), shape.block_size)
        pool = BlockPool(_block_count(shape, settings.kv_bytes))
        table = TokenTable.of(tokenizer, vocabulary)
        engine = cls(shape, contents, table, pool, registry, speed=settings.speed)
        if settings.kv_socket:
            client = RankClient(settings.kv_socket, session=settings.session, worker=settings.worker, rank=0)
            geometry = shape.geometry(settings.model, vocabulary)
            try:
                await asyncio.to_thread(client.attach, geometry)
            except BaseException:
                client.close()
                raise
            engine._copies = CopyThread(client, geometry, engine._pages, engine._on_copied)
        engine._loop = asyncio.create_task(engine._run(), name="sim-engine")
        return engine

    @property
    def info(self) -> EngineInfo:
        shape = self._shape
        return EngineInfo(
            name="sim",
            max_model_len=shape.max_model_len,
            max_running=shape.max_running,
            step_tokens=shape.token_budget,
            kv_blocks=self._pool.count,
            kv_tokens=self._pool.count * shape.block_size,
            splits=True,
            forces=True,
            details={
                "profile": shape.profile.name,
                "speed": self._speed,
                "kv": "on" if shape.has_kv else "off",
                "kv_bytes_per_token": shape.token_bytes,
                "block_size": shape.block_size,
                "fingerprint": self._contents.fingerprint,
            },
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        shape, sampling = self._shape, request.sampling
        refuse(request, shape.max_model_len, self._table.vocabulary)
        if self._failure is not None:
            raise self._failure
        reading = self._contents.read(request.tokens)
        salt: int = xxhash.xxh3_64_intdigest(request.salt.encode()) if request.salt else 0
        limit = min(sampling.max_tokens, shape.max_model_len - len(request.tokens))
        stream = DeltaStream(sampling.n)
        choices = [
            Choice(request, index, stream, reading=reading, salt=salt, limit=limit) for index in range(sampling.n)
        ]
        for choice in choices:
            choice.prepare(self._contents, self._table, request)
            self._planner.track(choice.id, request.kv, choice.prompt_tokens)
            self._scheduler.add(choice)
        self._streams.add(stream)
        self._wake.set()
        try:
            while stream.open or stream.deltas:
                for delta in await stream.take():
                    if delta.finish is not None:
                        stream.open -= 1
                    yield delta
        finally:
            self._streams.discard(stream)
            for choice in choices:
                if not choice.has_ended:
                    self._scheduler.end(choice)
            self._wake.set()

    def load(self) -> EngineLoad:
        scheduler = self._scheduler
        return self._counts.load(running=len(scheduler.running), waiting=scheduler.waiting, kv_usage=self._pool.usage)

    async def check_health(self) -> None:
        if self._failure is not None or self._loop is None or self._loop.done():
            raise EngineFailed("the engine has died")
        self._wake.set()  # the loop's next turn is the answer

    def silent_s(self) -> float:
        return self._liveness.look(time.monotonic())

    async def close(self) -> None:
        """Requests still running end with EngineFailed. Idempotent."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None
            self._fail("the engine was closed")
        if self._copies is not None:
            await asyncio.to_thread(self._copies.close)
            self._copies = None
        self._pages.close()

    # ---- the loop --------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                self._liveness.sign(time.monotonic())
                self._take_copied()
                step = self._scheduler.schedule()
                self._start_copies(step)
                if step.is_empty and not step.preempted and not self._copied:
                    self._ended_s = None
                    self._give_sampled()
                    self._wake.clear()
                    await self._wake.wait()
                elif not step.is_empty:
                    await self._compute(step)
        except Exception:  # the task's boundary: whoever waits for a token must hear of it
            log.exception("engine: a step failed")
            self._fail("a step of the engine failed")

    async def _compute(self, step: Step) -> None:
        now_s = time.monotonic()
        start_s = self._start_s(now_s)
        if self._shape.has_kv and self._bytes_of(step) > INLINE_BYTES:
            await asyncio.to_thread(self._work, step)
        else:
            self._work(step)
        if self._speed != math.inf:
            await self._sleep_until(start_s + self._step_s(step))
        self._start_saves(step.copies)  # nobody may have a block before it is computed
        self._end(step, time.monotonic())
        if self._speed == math.inf:
            self._repeat(step)
            await self._give_way(step)

    def _repeat(self, step: Step) -> None:
        """At infinite speed: the same decodes again, until one is about to end, others wait, or the loop has a turn."""
        choices: Any = step.decodes
        began_s, total = self._ended_s, 0
        while time.monotonic() < self._turn_s and (count := min(self._scheduler.repeats(step), REPEATS)) > 0:
            count = min([count, *(choice.plain_tokens for choice in choices)])
            if count <= 0:
                break
            total += count
            for choice in choices:
                if not choice.fresh:
                    self._sampled.append(choice)
                choice.sample_more(self._table, count)
                self._scheduler.repeated(choice)
        if total and began_s is not None:
            self._ended_s = time.monotonic()
            self._counts.steps.inc(total)
            self._counts.step_times.see(len(step.decodes), (self._ended_s - began_s) / total)

    async def _give_way(self, step: Step) -> None:
        """The loop's other tasks have their turn; a first token is on its way to its client before more are made."""
        is_due = time.monotonic() > self._turn_s
        if is_due:
            self._give_sampled()
        if is_due or step.chunks:
            for _ in range(TURNS if step.chunks else 1):
                await asyncio.sleep(0)
        if is_due:
            self._turn_s = time.monotonic() + TURN_S

    def _start_s(self, now_s: float) -> float:
        """When the step is to have begun: as the last one was to end, so that what a timer is late never adds up."""
        if self._ended_s is None or self._speed == math.inf:
            return now_s
        behind_s = now_s - self._due_s
        if behind_s < CATCH_UP_S:
            return self._due_s
        self._counts.late_s.inc(behind_s)
        return now_s

    def _step_s(self, step: Step) -> float:
        """A prompt's last token behind loaded ones costs what a decoded one does."""
        prefill, count, context = [], len(step.decodes), 0
        for chunk in step.chunks:
            if chunk.end - chunk.start == 1 and chunk.start:
                count += 1
                context += chunk.start
            else:
                prefill.append((chunk.end - chunk.start, chunk.start))
        context += sum(sequence.computed for sequence in step.decodes)
        return self._shape.profile.step_s(prefill, (count, context)) / self._speed

    async def _sleep_until(self, due_s: float) -> None:
        self._due_s = due_s
        left_s = due_s - time.monotonic()
        while left_s > SIGN_S:
            await asyncio.sleep(SIGN_S)
            self._liveness.sign(time.monotonic())
            left_s = due_s - time.monotonic()
        await asyncio.sleep(max(0.0, left_s))

    def _end(self, step: Step, now_s: float) -> None:
        """Tokens go out."""
        counts, table = self._counts, self._table
        counts.steps.inc()
        counts.preemptions += step.preempted
        if step.decodes and self._ended_s is not None:
            counts.step_times.see(len(step.decodes), now_s - self._ended_s)
        self._ended_s = now_s
        for sequence in step.decodes:
            if not sequence.has_ended:
                self._give(sequence, table)
        for chunk in step.chunks:
            choice: Any = chunk.sequence
            counts.computed_prompt_tokens += max(0, min(chunk.end, choice.prompt_tokens) - chunk.start)
            if not choice.has_ended and chunk.completes:
                self._give(choice, table)

    def _give(self, choice: Any, table: TokenTable) -> None:
        finish = choice.sample(table)
        if finish is not None:
            self._keep(choice)
            self._push(choice, choice.take(finish, self._scheduler.end(choice)))
        elif self._speed != math.inf or choice.produced == 1:
            self._push(choice, choice.take())
        elif len(choice.fresh) == 1:
            self._sampled.append(choice)

    def _give_sampled(self) -> None:
        """What several steps have made of a choice is one delta."""
        sampled, self._sampled = self._sampled, []
        for choice in sampled:
            if choice.fresh:
                self._push(choice, choice.take())

    def _push(self, choice: Choice, delta: EngineDelta) -> None:
        if choice.lease in self._telling:
            self._held.setdefault(choice.lease, []).append((choice.stream, delta))
        else:
            choice.stream.push(delta)

    def _keep(self, choice: Choice) -> None:
        """Before it gives up its blocks: hold those that the next turn begins with until they are stored."""
        size = self._contents.block_size
        if self._copies is None or not self._planner.keep(choice.id, choice.tokens, choice.computed, choice.blocks):
            return
        blocks = choice.blocks[: choice.computed // size]
        self._pool.begin_copy(blocks)
        reading = self._contents.read(choice.tokens[: len(blocks) * size])
        for block in range(choice.prompt_tokens // size, len(blocks)):
            self._pages.compute(blocks[block], reading.of_block(block, size), 0, size)

    def _fail(self, reason: str) -> None:
        self._failure = EngineFailed(reason)
        for stream in list(self._streams):
            stream.fail(EngineFailed(reason))

    # ---- bytes -----------------------------------------------------------------------------------------------

    def _bytes_of(self, step: Step) -> int:
        """Written, and read again where a prompt is complete."""
        tokens = sum(
            chunk.end - chunk.start + (chunk.sequence.prompt_tokens if chunk.completes else 0) for chunk in step.chunks
        )
        return tokens * self._shape.token_bytes

    def _work(self, step: Step) -> None:
        """Fill pages, and look at those of the prompts that are complete now. Perhaps in a thread."""
        size, pages = self._contents.block_size, self._pages
        for chunk in step.chunks:
            reading = chunk.sequence.reading
            for block in range(chunk.start // size, -(-chunk.end // size)):
                start = block * size
                pages.compute(
                    chunk.blocks[block],
                    reading.of_block(block, size),
                    max(0, chunk.start - start),
                    min(size, chunk.end - start),
                )
        for reading, hits in step.hits:
            # Tokens that were decoded: their pages are filled when somebody first needs them.
            for block, block_id in enumerate(hits):
                if pages.fills[block_id] < size:
                    pages.compute(block_id, reading.of_block(block, size), 0, size)
        for chunk in step.chunks:
            if chunk.completes:
                choice: Any = chunk.sequence
                choice.excess = self._excess(choice, chunk.blocks)

    def _excess(self, choice: Choice, blocks: list[int]) -> int:
        """What the prompt's pages, as they stand, hold beyond what its tokens call for; 0 when all is right."""
        size, total, wrong = self._contents.block_size, 0, 0
        for block in range(-(-choice.prompt_tokens // size)):
            if excess := self._pages.excess(blocks[block], choice.reading.of_block(block, size)):
                total += (2 * block + 1) * excess
                wrong += 1
        if wrong:
            self._counts.mismatched.inc(wrong)
            log.error("engine: %d KV blocks of a prompt are wrong: its text will be, too", wrong)
        return total & MASK

    def _start_copies(self, step: Step) -> None:
        if in_step := [load for load in step.copies.loads if load.in_step]:
            invalid = set().union(*map(self._load_in_step, in_step))
            self._scheduler.loaded_in_step(step, {load.request for load in in_step}, invalid)
        for load in step.copies.loads:
            if load.in_step:
                continue
            if self._copies is not None:
                self._copies.put(load)
            else:
                self._on_copied([Copied(load, {page.block_id for page in load.pages})])
        for keep in step.copies.keeps:
            if self._copies is not None:
                self._copies.put(keep)

    def _load_in_step(self, load: Load) -> set[int]:
        """Returns the pages that could not be filled."""
        if self._copies is None:
            return {page.block_id for page in load.pages}
        invalid, is_told = self._copies.load_now(load)
        if is_told:
            self._telling[load.lease] = self._telling.get(load.lease, 0) + 1
        return invalid

    def _start_saves(self, copies: StepPlan) -> None:
        for save in copies.saves:
            self._telling[save.lease] = self._telling.get(save.lease, 0) + 1
            if self._copies is not None:
                self._copies.put(save)
            else:
                self._on_copied([Copied(save)])

    def _on_copied(self, copied: list[Copied]) -> None:
        """A prompt whose blocks are stored has ended: it does not wait for the step of others that runs meanwhile."""
        for each in copied:
            if isinstance(each.copy, Save):
                self._scheduler.saved(each.copy)
            if isinstance(each.copy, (Save, Loaded)):
                self._told(each.copy.lease)
            else:
                self._copied.append(each)
        self._wake.set()

    def _take_copied(self) -> None:
        copied, self._copied = self._copied, []
        for each in copied:
            if isinstance(each.copy, Load):
                self._scheduler.loaded(each.copy.request, each.invalid)
            elif isinstance(each.copy, KeepCopy):
                self._planner.keeps_ended((each.copy.request,))
                self._pool.end_copy(each.copy.block_ids)

    def _told(self, lease: str) -> None:
        self._telling[lease] -= 1
        if not self._telling[lease]:
            del self._telling[lease]
            for stream, delta in self._held.pop(lease, []):
                stream.push(delta)


def _block_count(shape: SimShape, kv_bytes: int) -> int:
    least = -(-shape.max_model_len // shape.block_size)
    count = kv_bytes // shape.block_bytes if kv_bytes else max(least, DEFAULT_KV_BYTES // shape.block_bytes)
    if count < least:
        need_gib = least * shape.block_bytes / (1 << 30)
        raise SettingsError(
            f"setting 'kv_gib': {kv_bytes / (1 << 30):.3g} GiB hold {count * shape.block_size} tokens, fewer than one "
            f"prompt of {shape.max_model_len}: give {need_gib:.3g}, or a smaller --engine-arg max_model_len"
        )
    return int(count)

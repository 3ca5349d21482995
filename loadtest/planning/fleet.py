"""Tiers of engines in virtual time: what a list of requests would see on so many workers of a profile.

Each engine goes from step to step as the sim engine does: what it decodes first, then chunks of prompts up to the
step's budget. A prompt is taken by whichever prefill worker has room in its next step, first come first served; decode
workers are chosen by their sequences. Left out: the way over the bus and the gateway (milliseconds), preemption for
want of KV memory, and links that are full. Pure.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

import msgspec
import numpy as np

from loadtest.planning.demand import Demand
from loadtest.slo import Bools, Floats, Ints, Slo, good, steady
from shared.worker.sim.profile import Profile


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """`prefill` 0: engines that do both."""

    prefill: int = 0
    decode: int

    @property
    def workers(self) -> int:
        return self.prefill + self.decode


@dataclass(slots=True)
class Job:
    """One request under way; times from the start of the load."""

    demand: Demand
    left: int  # prompt tokens to compute
    computed_at: float = -1.0
    first_at: float = -1.0
    slow_before: int = 0  # slow steps of its engine when its first token came
    slow: int = 0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests saw, one entry each, and how busy the tiers were: shares of the time until all were served."""

    ttft_s: Floats
    computed_s: Floats  # until the prompt was computed
    steady: Bools
    good: Bools
    prefill_busy: float
    decode_busy: float
    kv_tokens: int  # the most that one decode worker's running sequences had


@dataclass(slots=True)
class Step:
    """`first`: whose blocks were there, and who gets a first token; `complete`: whose prompt is computed."""

    seconds: float
    prompt_tokens: int
    first: list[Job]
    complete: list[Job]


@dataclass(slots=True, eq=False)
class Engine:
    """One worker. `prompts`: to compute, in order; `joining`: computed elsewhere, and without a place yet."""

    profile: Profile
    slow_s: float  # a step that takes longer is a gap too long
    takes_line: bool
    prompts: deque[Job] = field(default_factory=deque)
    prompt_tokens: int = 0  # of those, and of the step that runs
    joining: deque[Job] = field(default_factory=deque)
    decoding: list[tuple[int, int, Job]] = field(default_factory=list)  # a heap, by the step of the last token
    context: int = 0  # tokens of those
    steps: int = 0  # in which something was decoded
    slow: int = 0
    busy_s: float = 0.0
    kv_tokens: int = 0
    is_running: bool = False
    serial: Iterator[int] = field(default_factory=count)

    @property
    def sequences(self) -> int:
        return len(self.decoding) + len(self.joining)

    def add_prompt(self, job: Job) -> None:
        self.prompts.append(job)
        self.prompt_tokens += job.left

    def begin(self) -> Step:
        first = []
        while self.joining and len(self.decoding) < self.profile.max_running:
            first.append(self.joining.popleft())
            self._decode(first[-1], steps=first[-1].demand.output_tokens, context=0)
        sequences = len(self.decoding)
        chunks, complete = self._chunks(self.profile.token_budget - sequences)
        seconds = self.profile.step_s(chunks, (sequences, self.context))
        if sequences:
            self.steps += 1
            self.slow += seconds > self.slow_s
            self.context += sequences
            self.kv_tokens = max(self.kv_tokens, self.context)
        self.busy_s += seconds
        return Step(seconds, sum(size for size, _ in chunks), first, complete)

    def end(self, step: Step, now: float) -> None:
        self.prompt_tokens -= step.prompt_tokens
        for job in step.first:
            job.first_at, job.slow_before = now, self.slow
        while self.decoding and self.decoding[0][0] <= self.steps:
            job = heappop(self.decoding)[2]
            job.slow = self.slow - job.slow_before
            self.context -= job.demand.prompt_tokens + job.demand.output_tokens
        for job in step.complete:
            job.computed_at = now

    def go_on_decoding(self, job: Job, now: float) -> None:
        """Its prompt was computed here, and its first token sampled behind it."""
        job.first_at, job.slow_before = now, self.slow
        if job.demand.output_tokens > 1:
            self._decode(job, steps=job.demand.output_tokens - 1, context=1)

    def _decode(self, job: Job, *, steps: int, context: int) -> None:
        self.context += job.demand.prompt_tokens + context
        heappush(self.decoding, (self.steps + steps, next(self.serial), job))

    def _chunks(self, budget: int) -> tuple[list[tuple[int, int]], list[Job]]:
        chunks: list[tuple[int, int]] = []
        complete: list[Job] = []
        while self.prompts and budget > 0 and len(self.decoding) + len(complete) < self.profile.max_running:
            job = self.prompts[0]
            size = min(job.left, budget)
            chunks.append((size, job.demand.prompt_tokens - job.left))
            job.left -= size
            budget -= size
            if job.left:
                break
            complete.append(self.prompts.popleft())
        return chunks, complete


class Simulation:
    """One list of requests on one fleet; `run` once."""

    def __init__(
        self, demands: Sequence[Demand], profile: Profile, fleet: Fleet, slo: Slo, link_bytes_s: float
    ) -> None:
        self._jobs = [Job(demand, demand.prompt_tokens - demand.cached_tokens) for demand in demands]
        self._profile, self._slo, self._link_bytes_s = profile, slo, link_bytes_s
        self._prefill = [Engine(profile, slo.itl_s, takes_line=True) for _ in range(fleet.prefill)]
        self._decode = [Engine(profile, slo.itl_s, takes_line=False) for _ in range(fleet.decode)]
        self._line: deque[Job] = deque()  # of prompts that no prefill worker has taken
        self._serial = count()
        self._events: list[tuple[float, int, Job | tuple[Engine, Step]]] = []

    def run(self) -> Served:
        for job in self._jobs:
            self._later(job.demand.at_s, job)
        now = 0.0
        while self._events:
            now, _, what = heappop(self._events)
            if isinstance(what, Job):
                self._arrive(what, now)
            else:
                self._ended(*what, now)
        return self._served(now)

    def _later(self, when: float, what: Job | tuple[Engine, Step]) -> None:
        heappush(self._events, (when, next(self._serial), what))

    def _arrive(self, job: Job, now: float) -> None:
        """At the gateway, or with its blocks at decode."""
        if job.computed_at >= 0:
            engine = min(self._decode, key=lambda one: one.sequences)
            engine.joining.append(job)
        elif self._prefill:
            self._line.append(job)
            engine = min(self._prefill, key=lambda one: one.is_running)
        else:
            engine = min(self._decode, key=lambda one: (one.prompt_tokens, one.sequences))
            engine.add_prompt(job)
        if not engine.is_running:
            self._step(engine, now)

    def _ended(self, engine: Engine, step: Step, now: float) -> None:
        engine.end(step, now)
        for job in step.complete:
            if engine.takes_line:
                # What came before the last chunk was pushed while that was computed.
                tokens = min(job.demand.prompt_tokens, self._profile.token_budget)
                self._later(now + tokens * self._profile.kv_bytes_per_token / self._link_bytes_s, job)
            else:
                engine.go_on_decoding(job, now)
        self._step(engine, now)

    def _step(self, engine: Engine, now: float) -> None:
        while engine.takes_line and self._line and engine.prompt_tokens < self._profile.token_budget:
            engine.add_prompt(self._line.popleft())
        step = engine.begin()
        engine.is_running = step.seconds > 0
        if engine.is_running:
            self._later(now + step.seconds, (engine, step))

    def _served(self, until_s: float) -> Served:
        jobs = self._jobs
        at_s = np.array([job.demand.at_s for job in jobs])
        gaps: Ints = np.array([job.demand.output_tokens - 1 for job in jobs], dtype=np.int64)
        in_time: Ints = gaps - np.array([job.slow for job in jobs], dtype=np.int64)
        ttft_s: Floats = np.array([job.first_at for job in jobs]) - at_s
        everybody: Bools = np.ones(len(jobs), dtype=np.bool_)
        return Served(
            ttft_s=ttft_s,
            computed_s=np.array([job.computed_at for job in jobs]) - at_s,
            steady=steady(gaps, in_time, self._slo),
            good=good(everybody, ttft_s, gaps, in_time, self._slo),
            prefill_busy=_busy(self._prefill, until_s),
            decode_busy=_busy(self._decode, until_s),
            kv_tokens=max(engine.kv_tokens for engine in self._decode),
        )


def serve(demands: Sequence[Demand], profile: Profile, fleet: Fleet, slo: Slo, link_bytes_s: float) -> Served:
    """`demands`: at least one, ascending. `link_bytes_s`: between a prefill and a decode worker."""
    return Simulation(demands, profile, fleet, slo, link_bytes_s).run()


def _busy(engines: Sequence[Engine], until_s: float) -> float:
    return sum(engine.busy_s for engine in engines) / (len(engines) * until_s) if engines and until_s else 0.0

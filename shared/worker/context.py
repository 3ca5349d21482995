"""What both job handlers work with: the engine, the store's client, the jobs, and this worker's load."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared import wire
from shared.bus import Bus
from shared.kv.client import KvClient
from shared.line import Line
from shared.worker.batches import Batches
from shared.worker.engine import Engine, EngineDelta
from shared.worker.jobs import Jobs
from shared.worker.metrics import WorkerMetrics
from shared.worker.rates import Prompts

if TYPE_CHECKING:
    from shared.worker.pulling import Pulling


@dataclass
class WorkerContext:
    """Built once, in host.py. Mutable: what is measured and counted, and `draining`."""

    id: str
    node: str
    engine: Engine
    kv: KvClient
    jobs: Jobs
    metrics: WorkerMetrics
    batches: Batches
    bus: Bus
    cluster: str
    reserve_s: float
    lease_s: float
    prompts: Prompts = field(default_factory=Prompts)  # that are computed here
    loads: Line = field(default_factory=lambda: Line(proportional=True))  # seconds from blocks to token, by tokens
    kv_promised: int = 0  # tokens of accepted prompts that wait for their blocks
    pulling: "Pulling | None" = None  # None: whoever built this asks no other node
    draining: bool = False

    def backlog(self) -> wire.Backlog:
        load = self.engine.load()
        prompts, tokens = self.prompts.backlog(time.monotonic())
        # Jobs that wait for a hand-off are not in the engine yet.
        waiting = max(load.waiting, len(self.jobs) - load.running)
        return wire.Backlog(running=load.running, waiting=waiting, queued_tokens=tokens, queued_prompts=prompts)

    def forget_speeds(self) -> None:
        """The self-test's were those of a cold engine."""
        self.prompts.forget()
        self.loads = Line(proportional=True)

    def count_prompt(self, prompt_tokens: int, delta: EngineDelta, pulled_tokens: int = 0) -> None:
        """Where a prompt's KV came from, once, with the last delta. `pulled_tokens`: from another node, for it."""
        if delta.finish is None:
            return
        computed = delta.computed_tokens
        pulled_tokens = min(pulled_tokens, delta.loaded_tokens)
        counts = {
            "computed": max(0, prompt_tokens - delta.cached_tokens) if computed is None else computed,
            "peer": pulled_tokens,
            "node": delta.loaded_tokens - pulled_tokens,
            "engine": max(0, delta.cached_tokens - delta.loaded_tokens),
        }
        for source, tokens in counts.items():
            if tokens:
                self.metrics.prefix_sources[source].inc(tokens)
        if delta.recomputed_tokens:
            self.metrics.recomputed_tokens.inc(delta.recomputed_tokens)
        if delta.unkept_tokens:
            self.metrics.unkept_tokens.inc(delta.unkept_tokens)

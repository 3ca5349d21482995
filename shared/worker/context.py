"""What both job handlers work with: the engine, the store's client, the jobs, and this worker's load."""

from dataclasses import dataclass

from shared import wire
from shared.kv.client import KvClient
from shared.worker.batches import Batches
from shared.worker.engine import Engine, EngineDelta
from shared.worker.jobs import Jobs
from shared.worker.metrics import WorkerMetrics


@dataclass
class WorkerContext:
    """Built once, in host.py. Mutable: `queued_tokens` and `draining`."""

    id: str
    node: str
    engine: Engine
    kv: KvClient
    jobs: Jobs
    metrics: WorkerMetrics
    batches: Batches
    reserve_s: float
    lease_s: float
    queued_tokens: int = 0
    draining: bool = False

    def backlog(self) -> wire.Backlog:
        load = self.engine.load()
        return wire.Backlog(running=load.running, waiting=load.waiting, queued_tokens=self.queued_tokens)

    def count_prompt(self, prompt_tokens: int, delta: EngineDelta) -> None:
        """Where a prompt's KV came from, once, with the last delta."""
        if delta.finish is None:
            return
        sources = self.metrics.prefix_tokens
        computed = delta.computed_tokens
        sources.labels(source="computed").inc(
            max(0, prompt_tokens - delta.cached_tokens) if computed is None else computed
        )
        sources.labels(source="node").inc(delta.loaded_tokens)
        sources.labels(source="engine").inc(max(0, delta.cached_tokens - delta.loaded_tokens))
        self.metrics.recomputed_tokens.inc(delta.recomputed_tokens)

"""A worker's metrics; names of design section 9."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from shared.process_metrics import watch_process


class WorkerMetrics:
    """One per process, passed to whoever counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        watch_process(self.registry)
        self.prefix_tokens = Counter(
            "baton_prefix_tokens",
            "Prompt tokens by where their KV came from",
            ["source"],
            registry=self.registry,
        )
        self.recomputed_tokens = Counter(
            "baton_kv_recomputed_tokens",
            "Prompt tokens that a hand-off or a cache had promised and this engine computed after all",
            registry=self.registry,
        )
        self.pulls = Counter(
            "baton_kv_pulls",
            "Prompts whose prefix another node was asked for; ok, late, stale and slower, or an error's code",
            ["outcome"],
            registry=self.registry,
        )
        self.unkept_tokens = Counter(
            "baton_kv_unkept_tokens",
            "Generated tokens that were not stored for the next turn: too many waited for that",
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "baton_batch_size",
            "Rows in a TokenBatch: sequences that got a token in one step",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.engine = Info("baton_engine", "The engine, and what it was started with", registry=self.registry)
        self.jobs = Gauge("baton_worker_jobs", "Jobs running on this worker", registry=self.registry)
        self.orphaned_jobs = Counter(
            "baton_orphaned_jobs",
            "Jobs stopped because the gateway that had asked for them died",
            registry=self.registry,
        )
        self.running = Gauge("baton_engine_running", "Sequences in the engine's batch", registry=self.registry)
        self.waiting = Gauge("baton_engine_waiting", "Requests in the engine's queue", registry=self.registry)
        self.kv_usage = Gauge("baton_engine_kv_usage", "Share of the engine's KV pages in use", registry=self.registry)
        self.preemptions = Gauge("baton_engine_preemptions", "Preemptions so far", registry=self.registry)
        self.computed_prompt_tokens = Gauge(
            "baton_engine_computed_prompt_tokens",
            "Prompt tokens computed so far, by the engine's own counter",
            registry=self.registry,
        )
        self.bad_messages = Gauge("baton_bus_bad_messages", "Messages dropped", registry=self.registry)
        self.prefix_sources = {
            source: self.prefix_tokens.labels(source=source) for source in ("computed", "engine", "node", "peer")
        }

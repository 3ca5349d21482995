"""What the sim engine counts of itself: load and speeds for heartbeats, and its own metrics."""

from prometheus_client import CollectorRegistry, Counter

from shared.worker.engine import EngineLoad
from shared.worker.rates import Steps


class SimCounts:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.preemptions = 0
        self.computed_prompt_tokens = 0
        self.step_times = Steps()
        self.mismatched = Counter(
            "baton_sim_kv_mismatched_blocks",
            "Blocks of prompts whose bytes, at the start of decoding, were not what their tokens call for",
            registry=registry,
        )
        self.late_s = Counter(
            "baton_sim_late_seconds",
            "Time by which the engine fell behind its profile for good: this machine is too slow for that speed",
            registry=registry,
        )
        self.steps = Counter("baton_sim_steps", "Steps", registry=registry)

    def load(self, *, running: int, waiting: int, kv_usage: float) -> EngineLoad:
        return EngineLoad(
            running=running,
            waiting=waiting,
            kv_usage=kv_usage,
            preemptions=self.preemptions,
            computed_prompt_tokens=self.computed_prompt_tokens,
            decode_step_s=self.step_times.step_s(running),
            decode_sequence_s=self.step_times.sequence_s,
        )

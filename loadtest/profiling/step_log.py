"""Schedulers that write down what each engine step did and how long it took: the hook inside vLLM's engine process.

Named to vLLM by `scheduler_cls`; the file's path comes in `additional_config`. A step lasts from the end of the step
before it to its own end, as the gap between two tokens does, with all that the engine's loop does between them; after
a pause it lasts from being scheduled. Where the kernel tells how long the engine's thread stood ready without a core,
that is taken off and written beside it: what other processes do is no property of the engine. Lines are written when
the engine has nothing left to do, outside of any step.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from loadtest.profiling.steps import EngineFacts, Step, write_line

PATH_KEY = "step_log"


class Moment(NamedTuple):
    at_s: float
    waited_s: float


class Clock:
    """For one thread, the one that makes it."""

    def __init__(self) -> None:
        path = Path("/proc/thread-self/schedstat")
        self._waits = path.open("rb", buffering=0) if path.exists() else None

    def now(self) -> Moment:
        at_s = time.perf_counter()
        if self._waits is None:
            return Moment(at_s, 0.0)
        self._waits.seek(0)
        return Moment(at_s, int(self._waits.read(64).split()[1]) / 1e9)


class StepLog:
    """Mixed into a scheduler of vLLM's; it only watches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_log = Path(self.vllm_config.additional_config[PATH_KEY])
        self._step_lines = [write_line(_facts(self))]
        self._step_work: dict[int, tuple[Moment, dict[str, Any]]] = {}  # by the identity of vLLM's SchedulerOutput
        self._step_ended: Moment | None = None  # None: the engine paused, or its last step computed nothing
        self._clock = Clock()
        self._write_steps()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        begun = self._step_ended or self._clock.now()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if output.total_num_scheduled_tokens:
            self._step_work[id(output)] = (begun, _work(self, output.num_scheduled_tokens))
        else:
            self._step_ended = None
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        ended = self._clock.now()
        if scheduled := self._step_work.pop(id(scheduler_output), None):
            begun, work = scheduled
            begun = max(begun, self._step_ended or begun)
            waited_s = ended.waited_s - begun.waited_s
            seconds = ended.at_s - begun.at_s - waited_s
            self._step_lines.append(write_line(Step(seconds=seconds, waited_s=waited_s, **work)))
            self._step_ended = ended
        if not self.has_unfinished_requests():
            self._step_ended = None
            self._write_steps()
        return outputs

    def _write_steps(self) -> None:
        with self._step_log.open("ab") as file:
            file.writelines(self._step_lines)
        self._step_lines.clear()

    # What the scheduler of vLLM brings.
    vllm_config: Any
    has_unfinished_requests: Any


class LoggedScheduler(StepLog, Scheduler):  # type: ignore[misc]
    """Steps one after another: CPU."""


class LoggedAsyncScheduler(StepLog, AsyncScheduler):  # type: ignore[misc]
    """The next step is scheduled while one runs: CUDA."""


def _work(scheduler: Any, scheduled: dict[str, int]) -> dict[str, Any]:
    """Of the requests as they are after scheduling: their computed tokens include this step's."""
    prefill, sequences, context = [], 0, 0
    for request_id, tokens in scheduled.items():
        request = scheduler.requests[request_id]
        before = request.num_computed_tokens - tokens
        if before < request.num_prompt_tokens:
            prefill.append((tokens, before))
        else:
            sequences += 1
            context += before
    return {"prefill": prefill, "sequences": sequences, "context": context}


def _facts(scheduler: Any) -> EngineFacts:
    config = scheduler.vllm_config
    groups = scheduler.kv_cache_config.kv_cache_groups
    per_block = sum(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
    block_tokens = config.cache_config.block_size
    ranks = config.parallel_config.tensor_parallel_size * config.parallel_config.pipeline_parallel_size
    return EngineFacts(
        max_model_len=config.model_config.max_model_len,
        max_running=config.scheduler_config.max_num_seqs,
        token_budget=config.scheduler_config.max_num_batched_tokens,
        kv_tokens=scheduler.kv_cache_config.num_blocks * block_tokens,
        kv_bytes_per_token=round(per_block * ranks / block_tokens),
    )

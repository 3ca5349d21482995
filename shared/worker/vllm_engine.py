"""The real engine: vLLM's AsyncLLM in this process, its EngineCore in one child.

The only file of the host that imports vllm. Any engine argument passes through; Baton adds its connector, asks for
recomputing where a load fails, and fills a request's unset parameters with the model's own defaults.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from shared import wire
from shared.errors import EngineFailed, InvalidRequest, SettingsError
from shared.parent_death import die_with_parent
from shared.worker.engine import EngineDelta, EngineInfo, EngineLoad, EngineRequest
from shared.worker.liveness import Liveness
from shared.worker.rates import Steps
from shared.worker.replay import EXTRA_ARG, enable_forcing, one_by_one, together
from shared.worker.vllm_telemetry import trace_requests

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

CONNECTOR = "BatonConnector"
CONNECTOR_MODULE = "services.kv_transfer.connector.connector"  # named by string: shared imports no service
SHUTDOWN_S = 5.0
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs of a worker's settings."""

    model: str
    revision: str
    args: dict[str, Any]
    kv_bytes: int  # the engine's own KV cache; 0: vLLM decides
    kv_socket: str
    session: str
    worker: str
    cpu_cores: frozenset[int]


class VllmEngine:
    """See shared/worker/engine.py for the protocol. Build on the main thread: its exit would end EngineCore."""

    def __init__(self, llm: "AsyncLLM", stats: "EngineStats", *, splits: bool, forces: bool) -> None:
        self._llm = llm
        self._stats = stats
        self._question: asyncio.Task[None] | None = None
        config = llm.vllm_config
        self._defaults: dict[str, Any] = config.model_config.get_diff_sampling_param()
        self._info = EngineInfo(
            name="vllm",
            max_model_len=config.model_config.max_model_len,
            max_running=config.scheduler_config.max_num_seqs,
            step_tokens=config.scheduler_config.max_num_batched_tokens,
            kv_blocks=config.cache_config.num_gpu_blocks or 0,
            kv_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            splits=splits,
            forces=forces,
            details={"vllm": _vllm_version(), "dtype": str(config.model_config.dtype)},
        )

    @classmethod
    async def start(cls, settings: EngineSettings) -> "VllmEngine":
        """Load the model; seconds to minutes.

        Raises SettingsError for arguments or models that vLLM refuses, EngineFailed when its processes do not start.
        """
        set_environment(settings.cpu_cores)
        wished = os.environ.get(START_METHOD, "")  # vLLM is about to overwrite it
        is_clean = "torch" not in sys.modules
        leave_host_when_forked(threads=alone())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.abstract import Executor

        stats = EngineStats()
        try:
            args = AsyncEngineArgs(**_arguments(settings))
            config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
            splits = can_split(config)
            if not splits:
                args.kv_transfer_config = None
                config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        except (TypeError, ValueError, OSError) as error:
            raise SettingsError(f"engine: {first_line(error)}") from error
        if not splits:
            log.warning("engine: this model's KV state cannot be handed over; it is served unsplit")
        forces = enable_forcing(config)
        executor = config.parallel_config.distributed_executor_backend
        if is_forked(executor, is_cpu=current_platform.is_cpu(), is_clean=is_clean, wished=wished):
            os.environ[START_METHOD] = "fork"
        try:
            llm = AsyncLLM(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=True,
                log_requests=False,
                stat_loggers=[stats.logger],
            )
        except RuntimeError as error:  # all that vLLM says of it; the cause is its process's last word
            raise EngineFailed(f"engine: {first_line(error)} Look for the last error above.") from error
        trace_requests(llm)
        return cls(llm, stats, splits=splits, forces=forces)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        if len(request.replay) > 1:
            return together([self._generate(choice) for choice in one_by_one(request)])
        return self._generate(request)

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineDelta, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            params = to_sampling_params(request, self._defaults)
            outputs = self._llm.generate(
                tokens_input(request.tokens, cache_salt=request.salt or None),
                params,
                request.id,
                trace_headers=request.trace_headers or None,
                priority=request.priority,
            )
            async for output in outputs:
                self._stats.liveness.sign(time.monotonic())
                for delta in to_deltas(output):
                    yield delta
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequest(first_line(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"the engine failed: {type(error).__name__}") from error

    def load(self) -> EngineLoad:
        return self._stats.load()

    async def check_health(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise EngineFailed("the engine has died") from error
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._ask())

    def silent_s(self) -> float:
        return self._stats.liveness.look(time.monotonic())

    async def _ask(self) -> None:
        """Something that EngineCore's loop answers between two steps; what it says does not matter."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.is_sleeping()
        except EngineDeadError:
            return  # the next check says so
        except Exception as error:  # noqa: BLE001 - an answer all the same
            log.debug("engine: %s", error)
        self._stats.liveness.sign(time.monotonic())

    async def close(self) -> None:
        """Ends EngineCore. Requests still running are to be closed before: their consumers would hang."""
        llm = self._llm
        if self._question is not None:
            self._question.cancel()
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # it would take the end of EngineCore for a crash
        await asyncio.get_running_loop().run_in_executor(None, lambda: llm.shutdown(timeout=SHUTDOWN_S))
        llm.shutdown = _nothing  # its finaliser calls it again, and fails when the interpreter has begun to go


class EngineStats:
    """What vLLM reports after each step, kept for heartbeats and metrics."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.preemptions = 0
        self.computed_prompt_tokens = 0
        self.step_times = Steps()
        self.liveness = Liveness(time.monotonic())

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self.running,
            waiting=self.waiting,
            kv_usage=self.kv_usage,
            preemptions=self.preemptions,
            computed_prompt_tokens=self.computed_prompt_tokens,
            decode_step_s=self.step_times.step_s(self.running),
            decode_sequence_s=self.step_times.sequence_s,
        )

    def logger(self, vllm_config: "VllmConfig", engine_index: int = 0) -> Any:  # noqa: ARG002
        """A StatLoggerFactory."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self

        class _Logger(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,  # noqa: ARG002
                engine_idx: int = 0,  # noqa: ARG002
            ) -> None:
                stats.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return _Logger()

    def record(self, scheduler: Any, iteration: Any) -> None:
        self.liveness.sign(time.monotonic())
        if scheduler is not None:
            self.running = scheduler.num_running_reqs
            self.waiting = scheduler.num_waiting_reqs
            self.kv_usage = scheduler.kv_cache_usage
        if iteration is not None:
            computed = iteration.prompt_token_stats.computed
            self.preemptions += iteration.num_preempted_reqs
            self.computed_prompt_tokens += computed
            if gaps_s := iteration.inter_token_latencies_iter:
                self.step_times.see(len(gaps_s), sum(gaps_s) / len(gaps_s))


def _nothing() -> None:
    """Instead of a second shutdown."""


def set_environment(cores: frozenset[int]) -> None:
    """Before vllm is imported. `VLLM_CPU_OMP_THREADS_BIND` does not apply to the `uni` executor: pin here."""
    if cores:
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # oneDNN keeps code and scratch memory for each of the last 1,024 shapes, and every prompt length is a new one: an
    # engine grew by 1.2 GiB over 2,000 prompts. A smaller cache holds it within 350 MiB at the same speed (measured).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def can_split(config: "VllmConfig") -> bool:
    """One group of plain attention KV; recurrent state, encoder-decoder and pooling models are served whole."""
    model = config.model_config
    return not (model.is_hybrid or model.is_attention_free or model.is_encoder_decoder)


def is_forked(executor: object, *, is_cpu: bool, is_clean: bool, wished: str) -> bool:
    """Whether EngineCore starts as a copy of this process: it need not import torch and vLLM once more (ADR 24).

    On CPUs, where vLLM would spawn it, and in one process.
    `executor`: as configured; `is_clean`: this process has not computed, see `alone`; `wished`: what the environment
    says, which wins.
    """
    return is_cpu and is_clean and executor == "uni" and wished in ("", "fork")


def alone() -> int:
    """Before vLLM is imported: torch computes on this thread only, here. Returns on how many it would have.

    Its other threads, once there, are missing in a copy, which waits for them for ever.
    """
    import torch

    threads: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def leave_host_when_forked(threads: int) -> None:
    """A copy computes on so many threads.

    Its signals would go on to this process's loop, which would take a SIGTERM for its own; and it holds this process's
    port and its connection to the bus, so that it must not outlive it.
    """

    def leave() -> None:
        import torch

        signal.set_wakeup_fd(-1)
        die_with_parent()
        torch.set_num_threads(threads)

    os.register_at_fork(after_in_child=leave)


def _arguments(settings: EngineSettings) -> dict[str, Any]:
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {"model": settings.model, "disable_log_stats": False, **settings.args}
    if settings.revision:
        arguments.setdefault("revision", settings.revision)
    if settings.kv_bytes:
        arguments.setdefault("kv_cache_memory_bytes", settings.kv_bytes)
    ranks = int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))
    # One process less, a third less memory, and faster steps than the default `mp` (measured).
    arguments.setdefault("distributed_executor_backend", "uni" if ranks == 1 else "mp")
    # torch.compile wants a compiler on the machine, doubles the time to ready on a CPU (40 s instead of 17) and gains
    # little there. Stages of a pipeline get nothing to hand on with `enforce_eager` (vLLM 0.32): traced, not compiled.
    if current_platform.is_cpu() and not {"enforce_eager", "compilation_config"} & arguments.keys():
        is_pipeline = int(arguments.get("pipeline_parallel_size", 1)) > 1
        arguments.update({"compilation_config": {"backend": "eager"}} if is_pipeline else {"enforce_eager": True})
    if settings.kv_socket:
        arguments["kv_transfer_config"] = {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "socket": settings.kv_socket,
                "session": settings.session,
                "worker": settings.worker,
            },
        }
    return arguments


def to_sampling_params(request: EngineRequest, defaults: Mapping[str, Any]) -> "SamplingParams":
    """VLLM's parameters: the request's, else the model's (generation_config), else vLLM's own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling = request.sampling
    chosen = {name: defaults[name] for name in _DEFAULTED if name in defaults}
    chosen.update({n: v for n in _DEFAULTED if (v := getattr(sampling, n)) is not None})
    return SamplingParams(
        **chosen,
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        seed=sampling.seed,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop=sampling.stop or None,
        stop_token_ids=sampling.stop_token_ids or None,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        bad_words=sampling.bad_words or None,
        logit_bias=sampling.logit_bias or None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        skip_special_tokens=sampling.skip_special_tokens,
        structured_outputs=StructuredOutputsParams(**sampling.structured) if sampling.structured else None,
        output_kind=RequestOutputKind.DELTA,
        extra_args=_extra_args(request) or None,
    )


def _extra_args(request: EngineRequest) -> dict[str, Any]:
    extra: dict[str, Any] = {"kv_transfer_params": msgspec.to_builtins(request.kv)} if request.kv else {}
    if request.replay:
        extra[EXTRA_ARG] = request.replay[0]
    return extra


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def to_deltas(output: "RequestOutput") -> list[EngineDelta]:
    """One delta a choice that has something new. Raises EngineFailed for a choice that ended in an error."""
    carried = output.kv_transfer_params or {}
    recomputed = carried.get("recomputed_tokens", 0)
    deltas = []
    for choice in output.outputs:
        reason = choice.finish_reason
        if reason not in (None, "stop", "length"):
            raise EngineFailed(f"the engine ended the request: {reason}")
        deltas.append(
            EngineDelta(
                choice=choice.index,
                text=choice.text,
                tokens=list(choice.token_ids),
                logprobs=_logprobs(choice.token_ids, choice.logprobs) if choice.logprobs else None,
                prompt_logprobs=_prompt_logprobs(output),
                finish=wire.Finish(reason=reason, stop_reason=choice.stop_reason) if reason else None,
                cached_tokens=max(0, (output.num_cached_tokens or 0) - recomputed),  # as it was when first scheduled
                computed_tokens=carried.get("computed_tokens"),
                loaded_tokens=carried.get("loaded_tokens", 0),
                recomputed_tokens=recomputed,
                unkept_tokens=carried.get("unkept_tokens", 0),
            )
        )
    return deltas


def _logprobs(tokens: Any, positions: Any) -> list[wire.TokenLogprob]:
    return [_logprob(token, position) for token, position in zip(tokens, positions, strict=False)]


def _prompt_logprobs(output: "RequestOutput") -> list[wire.TokenLogprob | None] | None:
    """With a request's first output only: vLLM forgets them as it gives them. The first token has none."""
    tokens, positions = output.prompt_token_ids, output.prompt_logprobs
    if not tokens or not positions:
        return None
    return [
        _logprob(token, position, rank=position[token].rank or 0) if position else None
        for token, position in zip(tokens, positions, strict=True)
    ]


def _logprob(token: int, position: Any, rank: int = 0) -> wire.TokenLogprob:
    """VLLM's {id: Logprob} of one position, the token itself always among them; ours are most likely first."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    own = position[token]
    return wire.TokenLogprob(
        token=own.decoded_token or "",
        token_id=token,
        logprob=own.logprob,
        rank=rank,
        top=[
            wire.TopLogprob(token=entry.decoded_token or "", token_id=token_id, logprob=entry.logprob)
            for token_id, entry in ranked
        ],
    )


def first_line(error: BaseException) -> str:
    """VLLM's and pydantic's errors run over many lines; the first that says something is enough for a user."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1]
    return lines[0] if lines else type(error).__name__


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)

"""vLLM's hooks, handed on to the side that they belong to. Nothing is decided here.

Written against vLLM 0.32 (KVConnectorBase_V1). Loads are asynchronous, on a thread, but for small ones where steps are
planned one by one; saves are done by the time a step ends, so a prompt's pages can be freed at once. What a request has
generated is kept for the next turn when it has ended, on that thread too: only then does `request_finished` delay the
freeing of its pages.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.request import RequestStatus

from services.kv_transfer.connector.lifeline import die_with_host
from services.kv_transfer.connector.worker_side import WorkerSide
from shared.kv.copies import StepPlan
from shared.kv.copy_planner import IN_STEP_BYTES, CopyPlanner

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

HELD_SHARE = 8  # one page in so many may be held for requests that have ended


@dataclass
class StepMetadata(KVConnectorMetadata):
    plan: StepPlan = field(default_factory=StepPlan)


class BatonConnector(KVConnectorBase_V1):
    """Not a SupportsHMA: one KV cache group only, so vLLM turns its hybrid manager off."""

    # A connector plays one role; vLLM never calls the other role's hooks.
    _scheduler: CopyPlanner
    _worker: WorkerSide

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        die_with_host()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = CopyPlanner(
                vllm_config.cache_config.block_size,
                keep_limit=kv_cache_config.num_blocks // HELD_SHARE,
                in_step_limit=_in_step_limit(vllm_config, kv_cache_config),
            )
        else:
            if vllm_config.device_config.device_type == "cpu" and hasattr(torch.cpu, "_init_amx"):
                # The attention kernel uses AMX tiles before anything has asked the kernel for them (SIGILL).
                torch.cpu._init_amx()  # noqa: SLF001
            self._worker = WorkerSide(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """Saves are out by the end of their step; a preemption cannot lose one."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:  # noqa: ARG003
        """Whole blocks of one layer must be contiguous, whatever the backend prefers."""
        return "LBHNC"

    # ---- scheduler side -------------------------------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        self._scheduler.track(request.request_id, request.kv_transfer_params, request.num_prompt_tokens)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._scheduler.matched_tokens(request.request_id, request.num_tokens, num_computed_tokens)
        return tokens, tokens > 0 and not self._scheduler.loads_in_step(tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            block_ids = blocks.get_block_ids()[0]
            self._scheduler.allocated(request.request_id, block_ids, request.num_tokens, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        state = scheduler_output.kv_connector_block_state
        counts = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return StepMetadata(
            self._scheduler.plan_step(
                [(request_id, before[request_id], before[request_id] + count) for request_id, count in counts.items()],
                lambda request_id: state.resolve_block_ids(request_id)[0],
                idle=not counts,
            )
        )

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.loads_ended(connector_output.finished_recving or (), connector_output.invalid_block_ids)
        self._scheduler.keeps_ended(connector_output.finished_sending or ())

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        is_kept = False
        if request.status in {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED}:
            # The token sampled last has no KV; under asynchronous scheduling more may be in flight than was sampled.
            computed = min(request.num_computed_tokens, request.num_tokens - 1)
            is_kept = self._scheduler.keep(request.request_id, request.all_token_ids, computed, block_ids)
        return is_kept, self._scheduler.finished(request.request_id)

    def has_pending_push_work(self) -> bool:
        """An idle engine goes on stepping until the pages that are held can be freed."""
        return self._scheduler.is_keeping

    # ---- worker side ----------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The first hook of a step, before it is computed."""
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin_step()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._worker.start(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request is not computed before its pages are filled, all of them."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole pages are copied once all layers have written them, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        self._worker.save(self._plan().saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        received, kept = self._worker.take_ended(wait=self._plan().idle)
        return kept or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid()

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.WORKER:
            self._worker.close()

    def _plan(self) -> StepPlan:
        plan: StepPlan = self._get_connector_metadata().plan
        return plan


def _in_step_limit(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> int:
    """Pages that may be loaded within a step.

    None where the next step is planned before this one's outcome is known: vLLM would compute on what is not there.
    """
    is_ahead = vllm_config.scheduler_config.async_scheduling or vllm_config.parallel_config.pipeline_parallel_size > 1
    if is_ahead or vllm_config.device_config.device_type != "cpu":
        return 0
    page_bytes = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks
    return int(IN_STEP_BYTES // page_bytes)

"""Decides, per step of an engine, which pages to load and which to save: for vLLM's connector and the sim engine alike.

A small load is done within the step that asks for it, and its request computed in that step: loaded beside the step it
would wait for a whole one of others. Only where each step is planned when the last one's outcome is known: elsewhere a
load that fails would be found out too late.

Invariants: no I/O; a request's loads are planned once an allocation, again after a preemption, never again after one
failed; a block is saved once per lease, in the step that completes it. Reservations are made before the engine sees
a request, so nothing here waits. What is kept of ended requests is bounded in blocks, since their pages are held.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shared import wire
from shared.kv.copies import KeepCopy, Load, Page, Save, StepPlan
from shared.worker.engine import KvPlan

IN_STEP_BYTES = 4 << 20  # of a rank, loaded within one step: a millisecond for those who run beside it


@dataclass
class _Tracked:
    plan: KvPlan
    prompt_tokens: int
    loading: dict[int, int] = field(default_factory=dict)  # block_id -> block, of the load in flight
    load_failed: bool = False
    loaded_tokens: int = 0
    recomputed_tokens: int = 0
    computed_tokens: int = 0  # prompt tokens that steps were scheduled for,
    last_tokens: int = 0  # and the last of them
    unkept_tokens: int = 0


class CopyPlanner:
    """All state is keyed by the engine's request ids and dropped in `finished`, except unsaved blocks, by lease."""

    def __init__(self, block_size: int, keep_limit: int, in_step_limit: int = 0) -> None:
        """`keep_limit`: pages that may be held for ended requests at once, beyond those of one.

        `in_step_limit`: pages that may be loaded within one step.
        """
        self._block_size = block_size
        self._in_step_limit = self._in_step_left = in_step_limit
        self._in_step: list[str] = []  # requests whose load is in the step planned last
        self._keep_limit = keep_limit
        self._requests: dict[str, _Tracked] = {}
        # Children of one request (n > 1) share a lease: the first to compute a block saves it.
        self._unsaved: dict[str, set[int]] = {}
        self._lease_users: dict[str, int] = {}
        self._loads: list[Load] = []
        self._keeps: list[KeepCopy] = []
        self._kept: dict[str, int] = {}  # pages held, by ended request

    @property
    def is_keeping(self) -> bool:
        """Pages of ended requests are held."""
        return bool(self._kept)

    def track(self, request_id: str, params: KvPlan | dict[str, Any] | None, prompt_tokens: int) -> None:
        """Remember a new request that came with a KvPlan. Raises msgspec.ValidationError for a malformed one."""
        if not params or request_id in self._requests:
            return
        plan = params if isinstance(params, KvPlan) else msgspec.convert(params, KvPlan)
        self._requests[request_id] = _Tracked(plan, prompt_tokens)
        self._lease_users[plan.lease] = self._lease_users.get(plan.lease, 0) + 1
        if plan.save and plan.lease not in self._unsaved:
            self._unsaved[plan.lease] = {block for block, write in enumerate(plan.write) if write}

    def matched_tokens(self, request_id: str, total_tokens: int, local_tokens: int) -> int:
        """Tokens beyond `local_tokens` (the engine's own hits) that the store can give. No side effects."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.load_failed:
            return 0
        # A preempted request's local hits may reach beyond the prompt.
        return max(0, self._covered(tracked, total_tokens) - local_tokens)

    def loads_in_step(self, external_tokens: int) -> bool:
        """Whether so many tokens are loaded within this step, and the rest of their prompt computed in it."""
        return 0 < -(-external_tokens // self._block_size) <= self._in_step_left

    def allocated(self, request_id: str, block_ids: list[int], total_tokens: int, external_tokens: int) -> bool:
        """Pages are there for what `matched_tokens` promised: plan the load. Returns whether it is within this step."""
        tracked = self._requests.get(request_id)
        if tracked is None or external_tokens <= 0:
            return False
        plan = tracked.plan
        covered = self._covered(tracked, total_tokens)
        first = (covered - external_tokens) // self._block_size
        last = -(-covered // self._block_size)
        pages = [Page(block, block_ids[block], plan.slots[block], plan.words[block]) for block in range(first, last)]
        tracked.loading = {page.block_id: page.block for page in pages}
        tracked.loaded_tokens = external_tokens
        in_step = self.loads_in_step(external_tokens)
        if in_step:
            self._in_step_left -= len(pages)
        self._loads.append(Load(request_id, plan.arena, plan.lease, pages, in_step))
        return in_step

    def _covered(self, tracked: _Tracked, total_tokens: int) -> int:
        """Tokens from the first on that are worth loading. The last one is always computed: it gives the logits."""
        return min(tracked.plan.load * self._block_size, tracked.prompt_tokens, total_tokens - 1)

    def plan_step(
        self, scheduled: Iterable[tuple[str, int, int]], blocks_of: Callable[[str], list[int]], *, idle: bool
    ) -> StepPlan:
        """The step's copies.

        Args:
            scheduled: (request id, tokens computed before this step, and after it) of every scheduled request.
            blocks_of: the page ids of a request, in order.
            idle: nothing is computed in this step.
        """
        saves = []
        for request_id, before, after in scheduled:
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            tracked.last_tokens = max(0, min(after, tracked.prompt_tokens) - before)
            tracked.computed_tokens += tracked.last_tokens
            if not tracked.plan.save:
                continue
            save = self._complete_blocks(tracked, after, request_id, blocks_of)
            if save.pages:
                saves.append(save)
        loads, self._loads = self._loads, []
        self._in_step = [load.request for load in loads if load.in_step]
        self._in_step_left = self._in_step_limit
        keeps, self._keeps = self._keeps, []
        return StepPlan(loads=loads, saves=saves, keeps=keeps, idle=idle)

    def _complete_blocks(
        self, tracked: _Tracked, computed_tokens: int, request_id: str, blocks_of: Callable[[str], list[int]]
    ) -> Save:
        plan, unsaved = tracked.plan, self._unsaved.get(tracked.plan.lease, set())
        end = min(computed_tokens, tracked.prompt_tokens)
        # The final block is complete when the prompt is, however little of it is filled.
        complete = -(-end // self._block_size) if end == tracked.prompt_tokens else end // self._block_size
        ready = sorted(block for block in unsaved if block < complete)
        if not ready:
            return Save(plan.arena, plan.lease, [])
        block_ids = blocks_of(request_id)
        unsaved.difference_update(ready)
        return Save(
            plan.arena,
            plan.lease,
            [Page(block, block_ids[block], plan.slots[block], plan.words[block]) for block in ready],
        )

    def loads_ended(self, received: Iterable[str], invalid_block_ids: set[int]) -> None:
        """What the workers report after a step: completed loads, and pages that could not be filled.

        The loads within that step are taken as ended without being named.
        """
        in_step, self._in_step = self._in_step, []
        for request_id in [*received, *in_step]:
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            failed = [tracked.loading[b] for b in invalid_block_ids if b in tracked.loading]
            if failed:
                first_loaded = min(tracked.loading.values())
                lost = tracked.loaded_tokens - (min(failed) - first_loaded) * self._block_size
                tracked.load_failed = True
                if request_id in in_step:
                    tracked.computed_tokens -= tracked.last_tokens  # on what was not there: thrown away
                tracked.recomputed_tokens += lost
                tracked.loaded_tokens -= lost
            tracked.loading = {}

    def computed_more(self, request_id: str, tokens: int) -> None:
        """Prompt tokens of a load that failed were computed within the same step."""
        if tracked := self._requests.get(request_id):
            tracked.computed_tokens += tokens

    def keep(self, request_id: str, tokens: Sequence[int], computed_tokens: int, block_ids: list[int]) -> bool:
        """Before `finished`, of a request that ended well: plan to store its full blocks for the next turn.

        Returns whether its pages must be held until `keeps_ended` names it.
        """
        tracked = self._requests.get(request_id)
        full = computed_tokens // self._block_size
        if tracked is None or not tracked.plan.keep or full <= tracked.prompt_tokens // self._block_size:
            return False
        if self._kept and sum(self._kept.values()) + full > self._keep_limit:
            tracked.unkept_tokens = full * self._block_size - tracked.prompt_tokens
            return False
        self._kept[request_id] = full
        packed = wire.pack_tokens(list(tokens[: full * self._block_size]))
        self._keeps.append(KeepCopy(request_id, bytes.fromhex(tracked.plan.salt), packed, block_ids[:full]))
        return True

    def keeps_ended(self, request_ids: Iterable[str]) -> None:
        """Their pages are stored, or nowhere to be stored."""
        for request_id in request_ids:
            self._kept.pop(request_id, None)

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """Forget a request. Returns what its output carries back to the host (see EngineDelta)."""
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return None
        lease = tracked.plan.lease
        self._lease_users[lease] -= 1
        if not self._lease_users[lease]:
            del self._lease_users[lease]
            self._unsaved.pop(lease, None)
        # A load planned in this very step must still run: its completion is what frees the pages.
        return {
            "loaded_tokens": tracked.loaded_tokens,
            "recomputed_tokens": tracked.recomputed_tokens,
            "computed_tokens": tracked.computed_tokens,
            "unkept_tokens": tracked.unkept_tokens,
        }

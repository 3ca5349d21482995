"""Getting a prompt's prefix from a node that has it, when that is faster than computing it.

Invariants: what is slower than computing would be is not waited for; what the index says is only where to ask, so a
stale entry costs a look-up and never a wrong token; blocks that came are held until the job has its own lease on them.
"""

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared import subjects, telemetry, wire
from shared.bus import Bus
from shared.errors import BatonError, KvLost
from shared.kv.client import KvClient
from shared.line import Line
from shared.worker.leases import leading
from shared.worker.metrics import WorkerMetrics
from shared.worker.rates import Prompts

log = logging.getLogger(__name__)

ASK_S = 1.0
HELD_S = 30.0  # until the job has a lease of its own
LEAST_S = 0.05  # is waited for blocks, however soon they could be computed: rates are rough
UNKNOWN_S = 1.0  # while it is not known how fast prompts are computed
ALWAYS_S = 10.0  # with `pull: always`
AGAIN_S = 10.0  # after so long a pull is tried though the last ones were slow: links get better


@dataclass(frozen=True, slots=True)
class _Wanted:
    node: str
    own: int  # leading blocks that are here, by the index
    limit_s: float


@dataclass(slots=True)
class Pulled:
    kv: KvClient
    lease: str
    tokens: int = 0
    is_held: bool = False

    def release(self) -> None:
        """Idempotent."""
        if self.is_held:
            self.is_held = False
            self.kv.release_soon(self.lease)


@dataclass
class Pulling:
    """One a worker."""

    bus: Bus
    cluster: str
    node: str
    kv: KvClient
    metrics: WorkerMetrics
    mode: str = "auto"  # auto | always | never
    again_s: float = AGAIN_S
    line: Line = field(default_factory=lambda: Line(proportional=True))  # seconds of a pull, by tokens
    _tried_s: float = float("-inf")

    async def pull(
        self, request: str, keys: list[bytes], block_size: int, holders: Mapping[str, int], prompts: Prompts
    ) -> Pulled:
        """What has come; release it when the job has its own lease. Never raises for want of blocks.

        Args:
            request: its id.
            keys: of the whole prompt.
            block_size: tokens of a full one.
            holders: node -> leading tokens that it holds, by the index.
            prompts: how fast this worker computes.
        """
        pulled = Pulled(self.kv, f"{request}-pull-{uuid.uuid4().hex[:8]}")
        try:
            wanted = self._wanted(len(keys), block_size, holders, prompts)
            if wanted is not None:
                await self._ask(pulled, request, keys, block_size, wanted)
        except BatonError as error:
            self._count(error.code)
            log.info("kv: nothing was pulled: %s", error.message)
        finally:
            if not pulled.tokens:
                pulled.release()
        return pulled

    def _wanted(self, blocks: int, block_size: int, holders: Mapping[str, int], prompts: Prompts) -> _Wanted | None:
        """The node that has most, if that is worth asking for."""
        own = min(holders.get(self.node, 0) // block_size, blocks)
        others = [(tokens, node) for node, tokens in holders.items() if node != self.node]
        if not others:
            return None
        tokens, node = max(others)
        gain = tokens - own * block_size
        if gain < block_size:
            return None
        limit_s = self._limit_s(gain, prompts, time.monotonic())
        return None if limit_s is None else _Wanted(node, own, limit_s)

    async def _ask(self, pulled: Pulled, request: str, keys: list[bytes], block_size: int, wanted: _Wanted) -> None:
        begun_s = self._tried_s = time.monotonic()
        subject = subjects.kv(self.cluster, wanted.node)
        found = await self.bus.request(subject, wire.KvLookup(keys=keys), wire.KvHeld, timeout_s=ASK_S)
        held = found.blocks if isinstance(found, wire.KvHeld) else 0
        if held <= wanted.own:
            self._count("stale")
            return
        pulled.is_held = True
        slots = await self.kv.reserve(
            lease=pulled.lease, request=request, keys=keys[:held], write=False, ttl_s=wanted.limit_s + HELD_S
        )
        before = leading(slots.committed)
        if before == held:
            return
        fetch = wire.KvFetch(
            node=self.node, lease=pulled.lease, keys=keys[before:held], traceparent=telemetry.traceparent()
        )
        await self.bus.request(subject, fetch, wire.KvHeld, timeout_s=ASK_S)
        after = leading((await self.kv.wait(pulled.lease, timeout_s=wanted.limit_s)).committed)
        pulled.tokens = (after - before) * block_size
        if not pulled.tokens:
            raise KvLost(f"no block of {wanted.node} came within {wanted.limit_s:.3f} s")
        self.line.see(pulled.tokens, time.monotonic() - begun_s)
        self._count("ok" if after == held else "late")

    def _limit_s(self, tokens: int, prompts: Prompts, now_s: float) -> float | None:
        """How long these tokens are worth waiting for; None: not at all."""
        if self.mode != "auto":
            return ALWAYS_S if self.mode == "always" else None
        _, token_s = prompts.line.terms()
        if token_s <= 0:
            return UNKNOWN_S
        compute_s = tokens * token_s
        fixed_s, each_s = self.line.terms()
        if fixed_s + each_s * tokens >= compute_s and now_s - self._tried_s < self.again_s:
            self._count("slower")
            return None
        return max(LEAST_S, compute_s)

    def _count(self, outcome: str) -> None:
        self.metrics.pulls.labels(outcome=outcome).inc()

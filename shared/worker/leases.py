"""Holding blocks of the node's store for as long as a job needs them, and never longer."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared import telemetry
from shared.kv.messages import Reserved
from shared.worker.context import WorkerContext


@asynccontextmanager
async def held(
    context: WorkerContext, request: str, attempt: int, keys: list[bytes], *, for_node: str, for_lease: str
) -> AsyncIterator[tuple[str, Reserved]]:
    """All blocks of a prompt to write, for a lease of this or another node, given back on every path out.

    For this node the lease ends by itself when all are there. Raises KvMemory or KvLost.
    """
    lease = f"{request}-{attempt}-{uuid.uuid4().hex[:8]}"
    is_near = for_node == context.node
    where = {"take_from": for_lease} if is_near else {"push_node": for_node, "push_lease": for_lease}
    slots = await reserve(
        context, lease, request, keys, write=True, tell_s=context.lease_s, ends_complete=is_near, **where
    )
    has_ended = False
    try:
        yield lease, slots
        has_ended = is_near and context.kv.ends_complete
    finally:
        if not has_ended:
            context.kv.release_soon(lease)


async def reserve(
    context: WorkerContext,
    lease: str,
    request: str,
    keys: list[bytes],
    *,
    write: bool,
    tell_s: float = 0.0,
    ends_complete: bool = False,
    **where: str,
) -> Reserved:
    """Ask the store, with this worker's limits. Raises KvMemory or KvLost."""
    return await context.kv.reserve(
        lease=lease,
        request=request,
        keys=keys,
        write=write,
        ttl_s=context.lease_s,
        wait_s=context.reserve_s,
        traceparent=telemetry.traceparent(),
        tell_s=tell_s,
        ends_complete=ends_complete,
        **where,
    )


def leading(committed: list[bool]) -> int:
    """How many blocks from the first on are committed: only a prefix can be loaded."""
    for position, is_committed in enumerate(committed):
        if not is_committed:
            return position
    return len(committed)

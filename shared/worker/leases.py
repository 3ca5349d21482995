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
    """All blocks of a prompt to write, for a lease of this or another node, released on every path out.

    Raises KvMemory or KvLost.
    """
    lease = f"{request}-{attempt}-{uuid.uuid4().hex[:8]}"
    where = {"take_from": for_lease}
    if for_node != context.node:
        where = {"push_node": for_node, "push_lease": for_lease}
    slots = await reserve(context, lease, request, keys, write=True, **where)
    try:
        yield lease, slots
    finally:
        context.kv.release_soon(lease)


async def reserve(
    context: WorkerContext, lease: str, request: str, keys: list[bytes], *, write: bool, **where: str
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
        **where,
    )


def leading(committed: list[bool]) -> int:
    """How many blocks from the first on are committed: only a prefix can be loaded."""
    for position, is_committed in enumerate(committed):
        if not is_committed:
            return position
    return len(committed)

"""A worker's host process at its node's store: reservations, waits and releases over one multiplexed connection.

Invariants: every call has a deadline; a reservation whose answer nobody will read is released; when the connection
ends every pending call fails with KvLost, and the client connects again by itself until it is closed. Leases and slots
of another arena (`Attached.arena`) mean nothing: `on_arena` tells of each change.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Self, TypeVar

import msgspec

from shared.backoff import Backoff
from shared.errors import BatonError, KvLost, NoCapacity, from_wire
from shared.kv.messages import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Answer,
    AnyCall,
    Attach,
    Attached,
    Body,
    Call,
    Ok,
    Ready,
    Refusal,
    Release,
    Reserve,
    Reserved,
    Unhealthy,
    Wait,
    decode_answer,
    encode,
)

log = logging.getLogger(__name__)

CALL_S = 5.0  # for an answer, beyond what the call itself may wait
ATTACH_S = 30.0  # the answer waits for an engine rank of this node to attach
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
MAX_PENDING = 4096

B = TypeVar("B", bound=Body)


class KvClient:
    """One per worker. Use `await connect(...)`, then the calls; end with `close`. All on one loop."""

    def __init__(
        self,
        socket_path: str,
        *,
        session: str,
        worker: str,
        on_unhealthy: Callable[[str], None] | None = None,
        on_arena: Callable[[Attached | None], None] | None = None,
    ) -> None:
        """Does nothing yet.

        Args:
            socket_path: the store's unix socket.
            session: shared with the engine ranks of this worker.
            worker: its id on the bus.
            on_unhealthy: the store cannot get slots back from a rank; the worker is to exit. Gets the reason.
            on_arena: called at every attach, and with None when the store is lost.
        """
        self.attached: Attached | None = None  # None while there is no store
        self._path = socket_path
        self._attach = Attach(session=session, kind="host", worker=worker)
        self._on_unhealthy = on_unhealthy or (lambda _reason: None)
        self._on_arena = on_arena or (lambda _attached: None)
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._calls = 0
        self._writer: asyncio.StreamWriter | None = None
        self._first: asyncio.Future[Attached] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pending_calls(self) -> int:
        return len(self._pending)

    async def connect(self, timeout_s: float = 60.0) -> Attached:
        """Attach; from here on the connection is kept. Waits for the store and for a first engine rank of the node.

        Raises KvLost when that takes longer than `timeout_s`, or what the store refuses with.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(), name="kv-client")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._first
        except TimeoutError:
            await self.close()
            raise KvLost(f"the store gave no arena within {timeout_s:g} s") from None
        except BaseException:
            await self.close()
            raise

    async def reserve(
        self,
        *,
        lease: str,
        request: str,
        keys: list[bytes],
        write: bool,
        ttl_s: float,
        wait_s: float = 0.0,
        take_from: str = "",
        traceparent: str = "",
        push_node: str = "",
        push_lease: str = "",
    ) -> Reserved:
        """All blocks or KvMemory; see messages.Reserve. Raises KvLost when the store is away."""
        call = Reserve(
            lease=lease,
            request=request,
            keys=keys,
            write=write,
            ttl_s=ttl_s,
            wait_s=wait_s,
            take_from=take_from,
            traceparent=traceparent,
            push_node=push_node,
            push_lease=push_lease,
        )
        try:
            return await self._call(call, Reserved, wait_s + CALL_S)
        except BatonError as error:
            if isinstance(error, KvLost):
                self.release_soon(lease)  # no answer came; it may have been granted
            raise
        except asyncio.CancelledError:
            self.release_soon(lease)
            raise

    async def wait(self, lease: str, timeout_s: float) -> Ready:
        """Until all blocks of the lease are committed, or the timeout with what there is.

        Raises KvLost when the lease ended or the store was lost meanwhile.
        """
        return await self._call(Wait(lease=lease, timeout_s=timeout_s), Ready, timeout_s + CALL_S)

    async def release(self, lease: str) -> None:
        """Give a lease back. Idempotent; a store that is away has it back already."""
        with contextlib.suppress(KvLost):
            await self._call(Release(lease=lease), Ok, CALL_S)

    def release_soon(self, lease: str) -> None:
        """`release` for paths that cannot wait: sent now, the answer is not awaited."""
        if self._writer is not None and not self._writer.is_closing():
            self._calls += 1
            self._writer.write(encode(Call(self._calls, Release(lease=lease))))

    async def close(self) -> None:
        """Disconnect; the store takes back every lease of this client. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- calls -----------------------------------------------------------------------------------------------

    async def _call(self, body: AnyCall, expect: type[B], timeout_s: float) -> B:
        writer = self._writer
        if writer is None or writer.is_closing():
            raise KvLost("the store is away")
        if len(self._pending) >= MAX_PENDING:
            raise NoCapacity(f"{MAX_PENDING} calls to the store are waiting")
        self._calls += 1
        call_id = self._calls
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[call_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                writer.write(encode(Call(call_id, body)))
                await writer.drain()
                answer = await future
        except TimeoutError:
            raise KvLost(f"the store did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise KvLost("the connection to the store broke") from error
        finally:
            self._pending.pop(call_id, None)
            future.cancel()
        return _checked(answer.body, expect)

    # ---- the connection --------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Attach, serve until the connection ends, and again."""
        backoff = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S, spread=(0.5, 1.0))  # workers come back at once
        while True:
            writer = None
            try:
                async with asyncio.timeout(CALL_S):
                    reader, writer = await asyncio.open_unix_connection(self._path)
                await self._serve(reader, writer)
            except (OSError, EOFError, msgspec.DecodeError, BatonError, TimeoutError) as error:
                if self.attached is not None:
                    backoff.reset()
                    log.warning("kv: the store is away: %s", type(error).__name__)
                elif isinstance(error, BatonError) and not error.retryable:
                    self._refused(error)
            finally:
                self._disconnected(writer)
            await asyncio.sleep(backoff.next_s())

    def _refused(self, error: BatonError) -> None:
        log.error("kv: not attached: %s", error.message)
        if self._first is not None and not self._first.done():
            self._first.set_exception(error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Attach, then read until the end; raises what ended it."""
        self._calls += 1
        writer.write(encode(Call(self._calls, self._attach)))
        async with asyncio.timeout(ATTACH_S):
            attached = _checked((await _read(reader)).body, Attached)  # nothing is pushed before it
        self.attached = attached
        self._writer = writer
        self._on_arena(attached)
        if self._first is not None and not self._first.done():
            self._first.set_result(attached)
        while True:
            answer = await _read(reader)
            if isinstance(answer.body, Unhealthy):
                self._on_unhealthy(answer.body.reason)
            elif (future := self._pending.get(answer.id)) is not None and not future.done():
                future.set_result(answer)

    def _disconnected(self, writer: asyncio.StreamWriter | None) -> None:
        self._writer = None
        if writer is not None:
            writer.transport.abort()
        if self.attached is not None:
            self.attached = None
            self._on_arena(None)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(KvLost("the store went away"))


def _checked(body: Body, expect: type[B]) -> B:
    if isinstance(body, Refusal):
        raise from_wire(body.code, body.message)
    if not isinstance(body, expect):
        raise KvLost(f"the store answered with {type(body).__name__}")
    return body


async def _read(reader: asyncio.StreamReader) -> Answer:
    length = int.from_bytes(await reader.readexactly(HEADER_BYTES), "little")
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    return decode_answer(await reader.readexactly(length))

"""The store on the bus: answers look-ups, releases and stats; beats, and says at once which worker has gone."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from opentelemetry.context import Context

from services.kv_transfer.peers.peers import Peers
from services.kv_transfer.store import Store
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BusUnavailable, InvalidRequest
from shared.version import VERSION

log = logging.getLogger(__name__)

BEAT_S = 0.2
MAX_LOST = 256  # as many as there can be sessions


class BusService:
    """Use `serve`, then `beat_forever` in a task."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        release: Callable[[str], None],
        *,
        cluster: str,
        service_id: str,
        node: str,
        incarnation: str,
        metrics_url: str,
        peers: Peers,
        moved_bytes: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.draining = False
        self._bus = bus
        self._store = store
        self._release = release
        self._cluster = cluster
        self._id = service_id
        self._node = node
        self._incarnation = incarnation
        self._metrics_url = metrics_url
        self._peers = peers
        self._moved_bytes = moved_bytes
        self._lost: list[str] = []
        self._wake = asyncio.Event()

    async def serve(self) -> None:
        """Listen on the node's subject and on ping; returns when the server knows."""
        await self._bus.serve(subjects.kv(self._cluster, self._node), self._answer)
        await self._bus.serve(subjects.ping(self._cluster, self._id), self._answer)
        await self._bus.listen(subjects.beats(self._cluster, "kv"), self._peers.directory.hear)
        await self._bus.flush()

    def host_closed(self, worker: str) -> None:
        """A worker's host connection closed: everybody is to know before its beats are missed."""
        if len(self._lost) < MAX_LOST:
            self._lost.append(worker)
        self._wake.set()

    def stats(self) -> wire.KvStats:
        geometry = self._store.sessions.geometry
        return wire.KvStats(
            node=self._node,
            slots=self._store.counts(),
            leases=self._store.gauges()["leases"],
            slot_bytes=geometry.slot_bytes if geometry else 0,
            fingerprint=geometry.fingerprint if geometry else "",
        )

    async def beat_forever(self) -> None:
        while True:
            await self.beat()
            self._wake.clear()
            if self._lost:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()

    async def beat(self) -> None:
        """One heartbeat. While the bus is away the beat is lost; the names of lost workers are kept for the next."""
        lost, self._lost = self._lost, []
        try:
            await self._bus.publish(subjects.beat(self._cluster, "kv", self._id), self._heartbeat(lost))
        except BusUnavailable as error:
            self._lost = (lost + self._lost)[:MAX_LOST]
            log.debug("beat not sent: %s", error.message)
            await asyncio.sleep(BEAT_S)

    def _heartbeat(self, lost: list[str]) -> wire.Heartbeat:
        geometry = self._store.sessions.geometry
        return wire.Heartbeat(
            role="kv",
            id=self._id,
            incarnation=self._incarnation,
            state="draining" if self.draining else "ready",
            node=self._node,
            max_model_len=geometry.max_model_len if geometry else 0,
            block_size=geometry.block_size if geometry else 0,
            fingerprint=geometry.fingerprint if geometry else "",
            metrics_url=self._metrics_url,
            version=VERSION,
            lost=lost,
            slots=self._store.counts(),
            peer_address=self._peers.address,
            peer_bytes_per_s=self._peers.speed.bytes_per_s,
            block_bytes=geometry.slot_bytes * geometry.ranks if geometry else 0,
            moved_bytes=self._moved_bytes(),
        )

    async def _answer(self, message: wire.AnyMessage, _context: Context) -> wire.Message:
        if isinstance(message, wire.KvLookup):
            return wire.KvHeld(node=self._node, blocks=self._store.held_prefix(message.keys))
        if isinstance(message, wire.KvFetch):
            blocks = self._peers.pushes.fetch(message.node, message.lease, message.keys, message.traceparent)
            return wire.KvHeld(node=self._node, blocks=blocks)
        if isinstance(message, wire.KvRelease):
            self._release(message.lease)
            return wire.Done()
        if isinstance(message, wire.KvStatsRequest):
            return self.stats()
        if isinstance(message, wire.Ping):
            return wire.Pong(id=self._id)
        raise InvalidRequest(f"a store does not take {type(message).__name__}")

"""A node's part in the KV plane between nodes: what it pushes, what it is pushed, and the transport for both."""

import logging
from collections.abc import Callable

from services.kv_transfer.arena import Arena
from services.kv_transfer.metrics import KvMetrics
from services.kv_transfer.peers.arrivals import Arrivals
from services.kv_transfer.peers.channel import plain
from services.kv_transfer.peers.directory import Directory
from services.kv_transfer.peers.handshake import Identity
from services.kv_transfer.peers.pushes import Pushes
from services.kv_transfer.peers.secure import mutual
from services.kv_transfer.peers.speed import Speed
from services.kv_transfer.peers.tcp import TcpTransport
from services.kv_transfer.store import Store
from shared.settings import KvSettings

log = logging.getLogger(__name__)


class Peers:
    """Without a `peer_secret` nothing listens, and nothing is pushed. Use `listen`, end with `close`."""

    def __init__(
        self, settings: KvSettings, store: Store, arena: Arena, metrics: KvMetrics, changed: Callable[[], None]
    ) -> None:
        """Does nothing yet. `changed`: called whenever the store was."""
        self._settings = settings
        self._transport: TcpTransport | None = None
        self._metrics = metrics
        self.speed = Speed()
        self.directory = Directory(settings.node)
        self.pushes = Pushes(store, arena, self.directory, changed=changed, failed=metrics.failed_transfer)
        self.arrivals = Arrivals(
            store,
            arena,
            changed=changed,
            refused=metrics.refused_frame,
            failed=metrics.failed_transfer,
            moved=metrics.moved_peer.inc,
        )

    @property
    def address(self) -> str:
        """As other nodes are to be told; empty: nothing listens."""
        return self._transport.address if self._transport is not None else ""

    @property
    def links(self) -> int:
        return self._transport.links if self._transport is not None else 0

    def listen(self) -> None:
        """Raises SettingsError."""
        settings = self._settings
        if not settings.peer_secret:
            log.info("no peer_secret: blocks stay on this node")
            return
        transport = TcpTransport(
            Identity(cluster=settings.cluster, node=settings.node, secret=settings.peer_secret),
            self.arrivals,
            limit_s=settings.peer_s,
            refused=self._metrics.refused_frame,
            received=self.speed.saw,
            secure=mutual(settings.tls, settings.peer_s) if settings.peer_tls == "on" else plain,
        )
        transport.listen(settings.peer_host, settings.peer_port, settings.peer_address)
        self._transport = self.pushes.transport = transport
        log.info("peers reach this node at %s", transport.address)

    def lease_ended(self, lease: str) -> None:
        self.pushes.lease_ended(lease)
        self.arrivals.lease_ended(lease)

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()

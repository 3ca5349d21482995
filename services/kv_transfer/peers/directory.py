"""Where other nodes' stores are, from their heartbeats."""

from shared import wire

MAX_NODES = 1024


class Directory:
    """Pure. Bounded; the node that was heard longest ago goes first."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._addresses: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def hear(self, beat: wire.AnyMessage) -> None:
        if not isinstance(beat, wire.Heartbeat) or beat.role != "kv" or beat.node == self._own or not beat.peer_address:
            return
        self._addresses.pop(beat.node, None)
        self._addresses[beat.node] = beat.peer_address
        if len(self._addresses) > MAX_NODES:
            del self._addresses[next(iter(self._addresses))]

    def address(self, node: str) -> str | None:
        return self._addresses.get(node)

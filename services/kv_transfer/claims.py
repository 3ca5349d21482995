"""Who waits for a key to be committed, and has set a block aside for its writer."""

from services.kv_transfer.leases import Lease
from services.kv_transfer.slots import NO_BLOCK
from shared.kv.messages import Reserve

Claim = tuple[Lease, int]  # and the position in its keys


class Claims:
    """Invariant: exactly the unready positions of living leases without `write`."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Claim]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, lease: Lease, position: int) -> None:
        self._by_key.setdefault(lease.keys[position], []).append((lease, position))

    def drop(self, lease: Lease, position: int) -> None:
        key = lease.keys[position]
        claims = self._by_key[key]
        claims.remove((lease, position))
        if not claims:
            del self._by_key[key]

    def fulfil(self, key: bytes) -> list[Claim]:
        """The key is committed: its claims end."""
        return self._by_key.pop(key, [])

    def set_aside(self, call: Reserve, key: bytes) -> Claim | None:
        """The claim whose block this call may take over to write into."""
        if not call.write or not call.take_from:
            return None
        for lease, position in self._by_key.get(key, ()):
            if lease.id == call.take_from and lease.blocks[position] != NO_BLOCK:
                return lease, position
        return None

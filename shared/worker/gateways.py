"""Which gateways live, by their heartbeats: work for one that has died is work for nobody. Pure: time is an argument.

A gateway that comes back with a new incarnation has died in between. One that was never heard is not judged.
Invariant: while this worker does not hear its own beats, the bus or the worker itself stands still, and then silence
says nothing: everybody gets the full time anew.
"""

from dataclasses import dataclass

from shared import wire

LOST_S = 10.0  # without a beat; a gateway that was only paused goes on with its streams
DEAF_S = 1.0  # without a beat of one's own


@dataclass(slots=True)
class _Gateway:
    incarnation: str
    seen_at: float


class Gateways:
    def __init__(self, worker: str) -> None:
        """`worker`: whose own beats are among those heard."""
        self._worker = worker
        self._heard_self_at = float("-inf")
        self._known: dict[str, _Gateway] = {}

    def hear(self, beat: wire.Heartbeat, now: float) -> bool:
        """Whether this beat tells that an earlier gateway of its id has died."""
        if beat.role != "gateway":
            if beat.id == self._worker:
                self._heard_self_at = now
            return False
        known = self._known.get(beat.id)
        self._known[beat.id] = _Gateway(beat.incarnation, now)
        return known is not None and known.incarnation != beat.incarnation

    def check(self, now: float) -> list[str]:
        """Those who have been silent for too long; each is told once."""
        if now - self._heard_self_at > DEAF_S:
            for gateway in self._known.values():
                gateway.seen_at = now
            return []
        lost = [name for name, gateway in self._known.items() if now - gateway.seen_at > LOST_S]
        for name in lost:
            del self._known[name]
        return lost

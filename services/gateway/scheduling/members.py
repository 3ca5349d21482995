"""The only listener to beats: every service that has beaten lately, whatever its role.

Who else goes by beats (the fleet, the dashboard, the quotas) is called from here, in one step for each beat. Pure: time
is an argument. Invariant: what is remembered is bounded.
"""

from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.scheduling.fleet import SUSPECT_S
from shared import wire

QUIET_S = 3.0  # without a beat it is not asked any more
MAX_MEMBERS = 4096

Hear = Callable[[wire.Heartbeat, float], None]


@dataclass(frozen=True, slots=True)
class Member:
    id: str
    role: str  # gateway | prefill | decode | kv
    metrics_url: str
    seen_at: float


class Members:
    def __init__(self, own_id: str, *hear: Hear) -> None:
        """`hear`: called with each beat and its time, in this order."""
        self._own_id = own_id
        self._hear = hear
        self._members: dict[str, Member] = {}
        self._heard_self_at = float("-inf")

    def __len__(self) -> int:
        return len(self._members)

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        if beat.id == self._own_id:
            self._heard_self_at = now
        if beat.id not in self._members and len(self._members) >= MAX_MEMBERS:
            self._members = {member.id: member for member in self.live(now)}
        if beat.id in self._members or len(self._members) < MAX_MEMBERS:
            self._members[beat.id] = Member(beat.id, beat.role, beat.metrics_url, now)
        for hear in self._hear:
            hear(beat, now)

    def live(self, now: float, role: str = "") -> list[Member]:
        """`role`: empty for all."""
        return [
            member for member in self._members.values() if now - member.seen_at < QUIET_S and role in ("", member.role)
        ]

    def other_gateways(self, now: float) -> list[str]:
        return [member.id for member in self.live(now, "gateway") if member.id != self._own_id]

    def hears_itself(self, now: float) -> bool:
        """Whose own beats do not come back cannot tell a silent worker from a bus that stands still."""
        return now - self._heard_self_at < SUSPECT_S

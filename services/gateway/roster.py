"""Every service that has beaten lately, whatever its role: whom to ask for metrics and traces.

Pure: time is an argument.
"""

from dataclasses import dataclass

from shared import wire

QUIET_S = 3.0  # without a beat it is not asked any more
MAX_MEMBERS = 4096


@dataclass(frozen=True, slots=True)
class Member:
    id: str
    role: str  # gateway | prefill | decode | kv
    metrics_url: str
    seen_at: float


class Roster:
    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        if beat.id not in self._members and len(self._members) >= MAX_MEMBERS:
            self._members = {member.id: member for member in self.live(now)}
            if len(self._members) >= MAX_MEMBERS:
                return
        self._members[beat.id] = Member(beat.id, beat.role, beat.metrics_url, now)

    def live(self, now: float, role: str = "") -> list[Member]:
        """`role`: empty for all."""
        return [
            member for member in self._members.values() if now - member.seen_at < QUIET_S and role in ("", member.role)
        ]

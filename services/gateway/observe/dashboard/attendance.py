"""Every service that has been heard of late, as the page shows it; those that were lost stay for a while.

Pure: time is an argument. Invariants: bounded in services and in those kept after their end; whether a worker is lost
is the failure detector's word (fleet.py), not a second opinion.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.gateway.scheduling.fleet import SUSPECT_S
from shared import wire

ROLES = ("gateway", "prefill", "decode", "kv")
WORKERS = frozenset({"prefill", "decode"})
KEEP_S = 300.0  # that one which has gone stays on the page, and one that came back is marked
GONE_S = 3.0  # of silence, for those whom the failure detector does not watch
MAX_SERVICES = 2048
MAX_GONE = 64


@dataclass(slots=True)
class _Service:
    beat: wire.Heartbeat
    seen_at: float
    gone_at: float | None = None  # when it was first missed
    back_at: float | None = None  # when its successor was ready


class Attendance:
    def __init__(self, model: str, is_known: Callable[[str], bool]) -> None:
        """`is_known`: whether the failure detector counts on a worker."""
        self._model = model
        self._is_known = is_known
        self._services: dict[str, _Service] = {}

    def __len__(self) -> int:
        return len(self._services)

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        if beat.role not in ROLES or (beat.model and beat.model != self._model):
            return
        known = self._services.get(beat.id)
        if known is None:
            if len(self._services) < MAX_SERVICES:
                self._services[beat.id] = _Service(beat, now)
            return
        if known.beat.incarnation != beat.incarnation and known.gone_at is None:
            known.gone_at = now  # replaced before it was missed
        known.beat, known.seen_at = beat, now

    def look(self, now: float) -> None:
        """Note who is missing or back, and forget whom nobody asks for any more."""
        for service in self._services.values():
            if not self._here(service, now):
                service.gone_at = now if service.gone_at is None else service.gone_at
                service.back_at = None
            elif service.gone_at is not None and service.beat.state == "ready" and service.back_at is None:
                service.back_at = now
            if service.back_at is not None and now - service.back_at > KEEP_S:
                service.gone_at = service.back_at = None
        gone = [id_ for id_, one in self._services.items() if not self._here(one, now)]
        gone.sort(key=lambda id_: self._services[id_].gone_at or 0.0)
        for at, id_ in enumerate(gone):
            if at < len(gone) - MAX_GONE or now - (self._services[id_].gone_at or now) > KEEP_S:
                del self._services[id_]

    def rows(self, now: float) -> list[dict[str, Any]]:
        """By role and number; what is empty or unknown is left out."""
        found = sorted(self._services.values(), key=lambda one: (ROLES.index(one.beat.role), _natural(one.beat.id)))
        return [self._row(service, now) for service in found]

    def alive(self, role: str, now: float) -> list[wire.Heartbeat]:
        return [one.beat for one in self._services.values() if one.beat.role == role and self._here(one, now)]

    def state(self, service: str, now: float) -> str | None:
        known = self._services.get(service)
        return None if known is None else self._state(known, now)

    # ---- inside --------------------------------------------------------------------------------------------

    def _here(self, service: _Service, now: float) -> bool:
        if service.beat.role in WORKERS:
            return self._is_known(service.beat.id)
        return now - service.seen_at < GONE_S

    def _state(self, service: _Service, now: float) -> str:
        if not self._here(service, now):
            return "stopped" if service.beat.state == "draining" else "lost"
        return "silent" if now - service.seen_at > SUSPECT_S else service.beat.state

    def _row(self, service: _Service, now: float) -> dict[str, Any]:
        beat = service.beat
        row: dict[str, Any] = {"id": beat.id, "role": beat.role, "state": self._state(service, now), "node": beat.node}
        if row["state"] in ("lost", "stopped", "silent"):
            row["quiet_s"] = round(now - service.seen_at, 1)
        elif service.gone_at is not None:
            row["gone_s"] = round(now - service.gone_at)
        load: dict[str, Any] = {
            "running": beat.backlog.running,
            "waiting": beat.backlog.waiting,
            "queued_tokens": beat.backlog.queued_tokens,
            "max_running": beat.max_running,
            "max_waiting": beat.max_waiting,
        }
        if beat.role in WORKERS:
            load |= {
                "takes": beat.takes,
                "engine": beat.engine,
                "kv": round(beat.kv_usage, 3),
                "step_ms": round(beat.decode_step_s * 1000, 2),
                "prefill_tokens_per_s": round(beat.prefill_tokens_per_s),
            }
        if beat.role == "kv":
            load |= {"slots": beat.slots}
        return row | {name: value for name, value in load.items() if value}


def _natural(name: str) -> list[tuple[int, str]]:
    """decode-2 comes before decode-10."""
    return [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]

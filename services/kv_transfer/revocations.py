"""Leases that are over while an engine may still be copying into their blocks.

Pure. A mapping cannot be taken away from outside, so the blocks come back only when every rank of the session has
said that it copies nothing under the lease any more, or has closed all its connections.
"""

from collections.abc import Callable

from services.kv_transfer.leases import Event, Revocation, RevokeAsked, Session, SessionUnhealthy

REVOKE_ANSWER_S = 5.0


class Revocations:
    def __init__(self, settle: Callable[[Revocation], None], emit: Callable[[Event], None]) -> None:
        """Start empty.

        Args:
            settle: takes the blocks of a revocation that all ranks have answered.
            emit: takes events for the server.
        """
        self._settle = settle
        self._emit = emit
        self._open: dict[str, tuple[Session, Revocation]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, lease: str) -> bool:
        return lease in self._open

    def ask(self, session: Session | None, revocation: Revocation) -> bool:
        """Returns whether answers are awaited; if there is nobody to ask or nothing to ask for, it settles at once."""
        if session is None or not revocation.ranks or not revocation.blocks:
            self._settle(revocation)
            return False
        self._open[revocation.lease.id] = (session, revocation)
        session.revocations.add(revocation.lease.id)
        self._emit(RevokeAsked(session.id, revocation.lease.id, frozenset(revocation.ranks)))
        return True

    def joined(self, session: Session, rank: int) -> None:
        """A rank (re)attached: it must answer what is open, too. Asking twice does no harm."""
        for lease in session.revocations:
            self._open[lease][1].ranks.add(rank)
            self._emit(RevokeAsked(session.id, lease, frozenset({rank})))

    def answered(self, session: Session, rank: int, lease: str) -> bool:
        """Returns whether that was the last answer awaited. Unknown leases are fine."""
        if lease not in session.revocations:
            return False
        revocation = self._open[lease][1]
        revocation.ranks.discard(rank)
        if revocation.ranks:
            return False
        del self._open[lease]
        session.revocations.remove(lease)
        self._settle(revocation)
        return True

    def blame(self, lease: str) -> None:
        """No answer in REVOKE_ANSWER_S: the worker is to exit, so that its sockets close."""
        session, revocation = self._open[lease]
        silent = ", ".join(map(str, sorted(revocation.ranks)))
        self._emit(SessionUnhealthy(session.id, f"rank {silent} did not answer a revoke in {REVOKE_ANSWER_S:g} s"))

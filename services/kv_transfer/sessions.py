"""Who is attached: sessions, their connections, and the geometry that they agree on.

Pure. Invariant: while any session is attached, or a guest has blocks in use, geometry and cut of the arena do not
change. Guests are links to other nodes' stores: they bring no geometry and are nobody's worker.
"""

from collections.abc import Callable

from services.kv_transfer.leases import Session
from shared.errors import InvalidRequest, KvMismatch, NoCapacity
from shared.kv.messages import Attach, Geometry

HOST, RANK, WATCH = "host", "rank", "watch"
MAX_SESSIONS = 256
MAX_NAME_CHARS = 256


class Sessions:
    def __init__(self, node: str, cut: Callable[[Geometry], None]) -> None:
        """Start with nobody.

        Args:
            node: for messages.
            cut: cuts the arena anew, dropping what is cached; may raise KvMismatch.
        """
        self.geometry: Geometry | None = None
        self._node = node
        self._cut = cut
        self._sessions: dict[str, Session] = {}
        self._guests: dict[str, Session] = {}
        self.lent_blocks = 0  # that are being sent to other nodes

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, session: str) -> Session | None:
        return self._sessions.get(session) or self._guests.get(session)

    def admit(self, guest: str) -> None:
        """A link that will write blocks; all ranks' slots at once, so it has one rank."""
        self._guests[guest] = Session(guest, guest, hosts=1, ranks={0: 1})

    def dismiss(self, guest: str) -> None:
        """Once it has neither leases nor revocations."""
        del self._guests[guest]

    def get(self, session: str) -> Session:
        found = self.find(session)
        if found is None:
            raise InvalidRequest("attach first")
        return found

    def attach(self, call: Attach) -> Session | None:
        """Count a connection in; None: a host or watch that must wait for the first rank's geometry."""
        _check(call)
        session = self._sessions.get(call.session)
        if session is not None and session.worker != call.worker:
            raise InvalidRequest(f"session is worker {session.worker}'s, not {call.worker}'s")
        if session is None and len(self._sessions) >= MAX_SESSIONS:
            raise NoCapacity(f"{MAX_SESSIONS} sessions are attached to {self._node} already")
        if call.kind == RANK:
            self._agree(call)
        elif self.geometry is None or not self._sessions:
            return None
        if session is None:
            session = self._sessions[call.session] = Session(call.session, call.worker)
        if call.kind == HOST:
            session.hosts += 1
        else:
            session.ranks[call.rank] = session.ranks.get(call.rank, 0) + 1
        return session

    def detach(self, session: Session, kind: str, rank: int) -> None:
        """Count a connection out. The caller frees what nobody can use any more."""
        if kind == HOST:
            session.hosts -= 1
        elif session.ranks[rank] > 1:
            session.ranks[rank] -= 1
        else:
            del session.ranks[rank]
        if session.is_gone:
            del self._sessions[session.id]

    def _agree(self, call: Attach) -> None:
        theirs = call.geometry
        if theirs is None:
            raise InvalidRequest("a rank must attach with its geometry")
        if not 0 <= call.rank < theirs.ranks:
            raise InvalidRequest(f"rank {call.rank} of {theirs.ranks}")
        if self.geometry == theirs:
            return
        busy_guests = [guest.id for guest in self._guests.values() if guest.leases or guest.revocations]
        if self.geometry is not None and (self._sessions or busy_guests or self.lent_blocks):
            names = {session.worker for session in self._sessions.values()} or {*busy_guests, "other nodes"}
            raise KvMismatch(
                f"worker {call.worker} has {_shown(theirs)}, but the store of {self._node} serves "
                f"{_shown(self.geometry)} to {', '.join(sorted(names))}"
            )
        self._cut(theirs)
        self.geometry = theirs


def _check(call: Attach) -> None:
    if call.kind not in {HOST, RANK, WATCH}:
        raise InvalidRequest("kind must be host, rank or watch")
    if not call.session or max(len(call.session), len(call.worker)) > MAX_NAME_CHARS:
        raise InvalidRequest(f"session and worker must be names of up to {MAX_NAME_CHARS} characters")


def _shown(geometry: Geometry) -> str:
    return (
        f"[fingerprint {geometry.fingerprint[:12]}, block_size {geometry.block_size}, slot_bytes "
        f"{geometry.slot_bytes}, ranks {geometry.ranks}, max_model_len {geometry.max_model_len}]"
    )

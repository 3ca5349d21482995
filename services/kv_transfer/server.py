"""The store on a unix socket: carries calls to it, late answers and pushes back, and its deadlines on one timer.

Invariants: the store is only touched here, on one loop; whatever a client sends or omits, the others are served; a
connection's answers and pushes leave in the order in which the store decided them.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.kv_transfer.arena import Arena
from services.kv_transfer.connection import StoreConnection
from services.kv_transfer.leases import (
    Answered,
    ArenaCut,
    Bound,
    Event,
    Evicted,
    HostClosed,
    Lease,
    LeaseEnded,
    PushBegun,
    PushReady,
    RevokeAsked,
    SessionUnhealthy,
    Ticket,
)
from services.kv_transfer.metrics import KvMetrics
from services.kv_transfer.sessions import HOST, RANK, WATCH
from services.kv_transfer.spans import StoreSpans
from services.kv_transfer.store import Store
from shared.errors import BatonError, Internal, InvalidRequest, KvLost, NoCapacity, SettingsError
from shared.kv.messages import (
    AnyAnswer,
    Attach,
    Attached,
    Call,
    Commit,
    Keep,
    Loaded,
    Ok,
    Refusal,
    Release,
    Reserve,
    Revoke,
    Revoked,
    Unhealthy,
    Wait,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_PENDING = 4096  # late answers a connection may wait for
LISTEN_BACKLOG = 256
PROBE_S = 1.0


def _nowhere(node: str) -> None:
    raise KvLost(f"no store of {node} is known")


def _ignored(*_: object) -> None:
    pass


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """Who else wants to know. Called on the loop; must not block or raise."""

    host_closed: Callable[[str], None]  # worker id
    key_changed: Callable[[bytes, bool], None]  # key, whether it is held now
    check_push: Callable[[str], None] = _nowhere  # raises when nothing can be pushed to that node
    push_begun: Callable[[Lease], None] = _ignored
    push_ready: Callable[[str, int], None] = _ignored  # lease, position
    lease_ended: Callable[[str], None] = _ignored


class KvServer:
    def __init__(self, node: str, store: Store, arena: Arena, metrics: KvMetrics, outside: Outside) -> None:
        self.connections: dict[int, StoreConnection] = {}
        self._node = node
        self._store = store
        self._arena = arena
        self._metrics = metrics
        self._outside = outside
        self._spans = StoreSpans()
        self._by_session: dict[str, set[StoreConnection]] = {}
        self._held: dict[int, Call] = {}  # attaches that wait for the first rank, by connection
        self._serial = 0
        self._path: Path | None = None
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._loop = asyncio.get_running_loop()

    async def start(self, path: str) -> None:
        """Listen. Raises SettingsError when the socket cannot be had."""
        listener = bind(Path(path))
        self._path = Path(path)
        self._server = await self._loop.create_unix_server(self._accept, sock=listener, backlog=LISTEN_BACKLOG)

    async def close(self) -> None:
        """Close every connection and remove the socket file. Clients see the end of their arena."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()
        if self._timer is not None:
            self._timer.cancel()
        gone = list(self.connections.values())
        self.connections.clear()  # so that `closed` does not report workers as lost
        for connection in gone:
            connection.abort()

    def release(self, lease: str) -> None:
        """On behalf of the lease's owner, from the bus."""
        self._store.release(lease, self._loop.time())
        self.pump()

    # ---- connections -----------------------------------------------------------------------------------------

    def _accept(self) -> StoreConnection:
        self._serial += 1
        return StoreConnection(self, self._serial)

    def opened(self, connection: StoreConnection) -> bool:
        if len(self.connections) >= MAX_CONNECTIONS:
            log.warning("kv: connection refused: %d are open", MAX_CONNECTIONS)
            return False
        self.connections[connection.serial] = connection
        return True

    def spoiled(self, connection: StoreConnection, reason: str) -> None:
        self._metrics.bad_frames.inc()
        log.warning("kv: %s closed: %s", connection.name, reason)

    def closed(self, connection: StoreConnection) -> None:
        if self.connections.pop(connection.serial, None) is None:
            return
        self._held.pop(connection.serial, None)
        who = connection.attached
        if who is not None:
            now = self._loop.time()
            members = self._by_session[who.session]
            members.discard(connection)
            if not members:
                del self._by_session[who.session]
            for number in connection.pending:
                self._store.abandon((connection.serial, number), now)
            self._store.detach(who.session, who.kind, who.rank, now)
            self.pump()

    def called(self, connection: StoreConnection, call: Call) -> None:
        """One frame, guarded: a call that breaks is answered and forgotten."""
        try:
            answer = self._act(connection, call)
        except BatonError as error:
            answer = Refusal(code=error.code, message=error.message)
        except Exception:  # the boundary of a message: the others must be served
            log.exception("kv: %s from %s failed", type(call.body).__name__, connection.name)
            answer = Refusal(code=Internal.code, message="internal error")
        if answer is not None:
            connection.send(call.id, answer)
        self.pump()

    # ---- calls -----------------------------------------------------------------------------------------------

    def _act(self, connection: StoreConnection, call: Call) -> AnyAnswer | None:
        """The answer; None when it comes later."""
        body, who = call.body, connection.attached
        if isinstance(body, Attach):
            return self._attach(connection, call, body)
        if who is None:
            raise InvalidRequest("attach first")
        now = self._loop.time()
        if isinstance(body, Reserve) and who.kind == HOST:
            if body.push_node:
                self._outside.check_push(body.push_node)
            ticket = self._ticket(connection, call.id)
            return self._kept(connection, ticket, lambda: self._store.reserve(who.session, body, ticket, now))
        if isinstance(body, Wait) and who.kind == HOST:
            ticket = self._ticket(connection, call.id)
            return self._kept(connection, ticket, lambda: self._store.wait(who.session, body, ticket, now))
        if isinstance(body, Release) and who.kind == HOST:
            self._store.release(body.lease, now, who.session)
        elif isinstance(body, Commit) and who.kind == RANK:
            self._commit(who, body, now)
        elif isinstance(body, Keep) and who.kind == RANK:
            return self._store.keep(who.session, body, now)
        elif isinstance(body, Loaded) and who.kind == RANK:
            self._loaded(who, body)
        elif isinstance(body, Revoked) and who.kind == WATCH:
            self._store.revoked(who.session, who.rank, body.lease, now)
        else:
            raise InvalidRequest(f"{type(body).__name__} is not for a {who.kind} connection")
        return Ok()

    def _attach(self, connection: StoreConnection, call: Call, body: Attach) -> Attached | None:
        if connection.attached is not None:
            raise InvalidRequest("this connection is attached already")
        layout = self._store.attach(body)
        connection.has_spoken()
        geometry = self._store.sessions.geometry
        if layout is None or geometry is None:
            self._held[connection.serial] = call
            return None
        connection.attached = body
        self._by_session.setdefault(body.session, set()).add(connection)
        log.info("kv: %s attached", connection.name)
        return Attached(
            arena=self._arena.name,
            path=str(self._arena.path),
            size_bytes=self._arena.size_bytes,
            words_offset=layout.words_offset,
            slots_offset=layout.slots_offset,
            slot_bytes=layout.slot_bytes,
            slots=layout.slots,
            node=self._node,
            geometry=geometry,
        )

    def _ticket(self, connection: StoreConnection, call_id: int) -> tuple[int, int]:
        if len(connection.pending) >= MAX_PENDING:
            raise NoCapacity(f"{MAX_PENDING} calls of this connection are waiting")
        self._serial += 1
        connection.pending[self._serial] = call_id
        return connection.serial, self._serial

    def _kept(
        self, connection: StoreConnection, ticket: tuple[int, int], act: Callable[[], AnyAnswer | None]
    ) -> AnyAnswer | None:
        """Forget the ticket unless the answer comes later."""
        answer: AnyAnswer | None = Ok()
        try:
            answer = act()
        finally:
            if answer is not None:
                del connection.pending[ticket[1]]
        return answer

    def _commit(self, who: Attach, body: Commit, now: float) -> None:
        lease = self._store.find_lease(body.lease)
        before = self._store.written_bytes
        fresh = self._store.commit(who.session, who.rank, body, now)
        # What is kept is no part of a request's time; a push has a span of its own.
        if lease is not None and not lease.ends_complete and not lease.push_node:
            self._spans.committed(lease, fresh, self._store.written_bytes - before, body.started_ns)

    def _loaded(self, who: Attach, body: Loaded) -> None:
        geometry = self._store.sessions.geometry
        if geometry is None or min(body.blocks, body.failed) < 0:
            raise InvalidRequest("loaded counts blocks")
        size_bytes = body.blocks * geometry.slot_bytes
        self._metrics.moved_local.inc(size_bytes)
        self._metrics.failed_loads.inc(body.failed)  # the worker counts the tokens that it recomputes
        lease = self._store.find_lease(body.lease)
        if lease is not None:
            self._spans.loaded(lease, body, who.rank, size_bytes)

    # ---- events and time -------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Carry out what the store decided, until it has no more to say; then wait for its next deadline."""
        while events := self._store.take_events():
            for event in events:
                try:
                    self._carry_out(event)
                except Exception:  # the boundary of an event: the next ones and the timer must not suffer
                    log.exception("kv: %s was not carried out", type(event).__name__)
        self._arm()

    def _carry_out(self, event: Event) -> None:
        if isinstance(event, Bound | Evicted):
            self._outside.key_changed(event.key, isinstance(event, Bound))
        elif isinstance(event, Answered):
            self._answer(event.ticket, event.answer)
        elif isinstance(event, PushReady):
            self._outside.push_ready(event.lease, event.position)
        elif isinstance(event, PushBegun):
            if (lease := self._store.find_lease(event.lease)) is not None:
                self._outside.push_begun(lease)
        elif isinstance(event, LeaseEnded):
            self._outside.lease_ended(event.lease)
            geometry = self._store.sessions.geometry
            self._spans.ended(event.lease, geometry.ranks if geometry else 1)
            if event.expired:
                self._metrics.expired_leases.inc()
                log.warning("kv: lease %s revoked at its deadline", event.lease)
        elif isinstance(event, RevokeAsked):
            self._push(event.session, Revoke(lease=event.lease), WATCH, event.ranks)
        elif isinstance(event, SessionUnhealthy):
            self._metrics.unhealthy_sessions.inc()
            log.error("kv: session %s is unhealthy: %s", event.session, event.reason)
            self._push(event.session, Unhealthy(reason=event.reason), HOST, frozenset({0}))
        elif isinstance(event, HostClosed):
            log.info("kv: worker %s closed its host connection", event.worker)
            self._outside.host_closed(event.worker)
        elif isinstance(event, ArenaCut):
            self._answer_held()

    def _answer(self, ticket: Ticket, answer: AnyAnswer | BatonError) -> None:
        if not isinstance(ticket, tuple):
            raise TypeError("a ticket of this server was expected")
        connection = self.connections.get(ticket[0])
        if connection is not None and (call_id := connection.pending.pop(ticket[1], None)) is not None:
            if isinstance(answer, BatonError):
                answer = Refusal(code=answer.code, message=answer.message)
            connection.send(call_id, answer)

    def _push(self, session: str, body: Revoke | Unhealthy, kind: str, ranks: frozenset[int]) -> None:
        for connection in self._by_session.get(session, ()):
            who = connection.attached
            if who is not None and who.kind == kind and (kind == HOST or who.rank in ranks):
                connection.send(0, body)

    def _answer_held(self) -> None:
        held, self._held = self._held, {}
        for serial, call in held.items():
            self.called(self.connections[serial], call)

    def _arm(self) -> None:
        earliest = self._store.next_deadline()
        if self._timer is not None:
            if earliest is not None and self._timer_at <= earliest:
                return  # it comes too early at worst, and then looks again
            self._timer.cancel()
            self._timer = None
        if earliest is not None:
            self._timer = self._loop.call_at(earliest, self._on_time)
            self._timer_at = earliest  # uvloop's handles do not always know

    def _on_time(self) -> None:
        self._timer = None
        try:
            self._store.advance(self._loop.time())
        finally:
            self.pump()


def bind(path: Path) -> socket.socket:
    """A socket at this path for its owner alone. Raises SettingsError; a dead predecessor's file is replaced."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise SettingsError(f"setting 'kv_socket': {path} exists and is no socket")
    if _is_served(path):
        raise SettingsError(f"setting 'kv_socket': another kv_transfer listens on {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # before it has a name: never open to others
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SettingsError(f"setting 'kv_socket': cannot listen on {path}: {error}") from error
    listener.setblocking(False)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True

"""An engine rank's way to its node's store: map the arena, copy under leases, commit. Blocking; no asyncio, no torch.

Invariants: a copy starts only under a lease that was not revoked, in the arena that it was reserved in; a revoke is
answered only when no copy under that lease runs; sockets and mapping are given up only when no copy runs at all. After
a restart of the store a thread attaches again by itself; leases and slots of the old arena mean nothing then.

How to copy:

    if client.begin_copy(lease, arena):
        try:
            ...  # client.word(slot), client.slot_view(slot): valid here, and only here
        finally:
            client.end_copy(lease)
"""

import contextlib
import logging
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from shared.backoff import Backoff
from shared.errors import BatonError, KvLost, from_wire
from shared.kv.messages import (
    AnyCall,
    Attached,
    Body,
    Commit,
    Geometry,
    Keep,
    Loaded,
    Ok,
    Refusal,
    Reserved,
    Revoke,
    Revoked,
)
from shared.kv.rank_link import RankLink, is_fatal, open_link, read_answer

log = logging.getLogger(__name__)

REMEMBERED_REVOKES = 65536
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
REPORTS = 256  # at once: some 30 bytes of answer each
KEEP_KEYS = 1024  # at once, so that both ends' buffers hold calls and answers

T = TypeVar("T")
OnMapped = Callable[[memoryview], Callable[[], None]]


class RankClient:
    """One per engine rank. All methods may be called from any thread."""

    def __init__(
        self, socket_path: str, *, session: str, worker: str, rank: int, on_mapped: OnMapped | None = None
    ) -> None:
        """Does nothing yet.

        Args:
            socket_path: the store's unix socket.
            session: shared with the worker's host and its other ranks.
            worker: its id on the bus.
            rank: 0 … geometry.ranks - 1.
            on_mapped: gets each arena that is mapped; what it returns is called before that is unmapped.
        """
        self._on_mapped = on_mapped
        self._path = socket_path
        self._session = session
        self._worker = worker
        self._rank = rank
        self._geometry: Geometry | None = None
        self._state = threading.Condition()
        self._link: RankLink | None = None
        self._is_usable = False  # False while the link is given up, though copies may still run over it
        self._copies: dict[str, int] = {}
        self._revoked: OrderedDict[str, None] = OrderedDict()
        self._answerable: list[str] = []  # revokes whose copies have ended
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)

    @property
    def arena(self) -> str | None:
        """The name of the arena that slots refer to now; None while detached."""
        with self._state:
            return self._link.attached.arena if self._link is not None and self._is_usable else None

    def attach(self, geometry: Geometry, timeout_s: float = 60.0) -> Attached:
        """Attach for the first time; once. Later losses are repaired in the background.

        Raises KvMismatch (another geometry is served, or the arena is too small) or, at the timeout, KvLost.
        """
        self._geometry = geometry
        deadline = time.monotonic() + timeout_s
        backoff = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S)
        while True:
            rest_s = backoff.next_s()
            try:
                attached = self._open(geometry)
                break
            except BatonError as error:
                if is_fatal(error) or time.monotonic() + rest_s > deadline:
                    raise
            time.sleep(rest_s)
        self._thread = threading.Thread(target=self._watch_forever, name="kv-watch", daemon=True)
        self._thread.start()
        return attached

    def begin_copy(self, lease: str, arena: str | None = None) -> bool:
        """Whether a copy under this lease may start now; if so, `end_copy` must follow, whatever happens.

        With `arena`, only while that one is attached. Copies may overlap, also under one lease.
        """
        with self._state:
            if self._link is None or not self._is_usable or lease in self._revoked:
                return False
            if arena is not None and arena != self._link.attached.arena:
                return False
            self._copies[lease] = self._copies.get(lease, 0) + 1
            return True

    def end_copy(self, lease: str) -> None:
        with self._state:
            self._copies[lease] -= 1
            if self._copies[lease] > 0:
                return
            del self._copies[lease]
            if lease in self._revoked:
                self._answerable.append(lease)
                self._wake()
            self._state.notify_all()

    def slot_view(self, slot: int) -> memoryview:
        """The slot's bytes, writable, straight in the arena. Raises KvLost while detached."""
        return self._linked().slot_view(slot)

    def word(self, slot: int) -> int:
        """The slot's generation word now."""
        return self._linked().word(slot)

    def commit(self, lease: str, blocks: list[int], checksums: list[int], started_ns: int = 0) -> None:
        """This rank has written these positions of the lease. Raises KvLost when lease or store is gone."""
        self._call(Commit(lease=lease, blocks=blocks, checksums=checksums, started_ns=started_ns))

    def keep(self, call: Keep) -> Reserved:
        """Slots for what an ended request leaves. Raises KvMemory, or KvLost."""
        return self._over_the_link(lambda link: link.call(call, Reserved))

    def keep_all(self, calls: Sequence[Keep]) -> list[Reserved | BatonError]:
        """Many `keep` at once, each with its answer. Raises KvLost when the store is away."""
        found: list[Reserved | BatonError] = []
        part: list[Keep] = []
        for call in calls:
            if part and sum(len(asked.keys) for asked in part) + len(call.keys) > KEEP_KEYS:
                found += map(_reserved, self._call_all(part))
                part = []
            part.append(call)
        return found + ([_reserved(body) for body in self._call_all(part)] if part else [])

    def loaded(self, lease: str, *, blocks: int, failed: int, started_ns: int, ended_ns: int) -> None:
        """Report copies out of the arena, for metrics and traces. Raises KvLost when the store is gone."""
        self._call(Loaded(lease=lease, blocks=blocks, failed=failed, started_ns=started_ns, ended_ns=ended_ns))

    def report(self, bodies: Sequence[Commit | Loaded]) -> list[BatonError | None]:
        """Many `commit` and `loaded` at once: an engine with hundreds of short prompts a second has no time for each.

        Returns what became of each. Never raises.
        """
        found: list[BatonError | None] = []
        for start in range(0, len(bodies), REPORTS):
            part = bodies[start : start + REPORTS]
            try:
                answers = self._call_all(part)
            except KvLost as error:
                found.extend([error] * len(part))
                continue
            found.extend(from_wire(a.code, a.message) if isinstance(a, Refusal) else None for a in answers)
        return found

    def close(self, timeout_s: float = 5.0) -> None:
        """Detach; waits for running copies. Idempotent."""
        with self._state:
            if self._is_closed:
                return
            self._is_closed = True
            self._is_usable = False
            self._wake()
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning("kv: a copy still runs at close; the process's end will detach")
                return
        self._wake_in.close()
        self._wake_out.close()

    # ---- the link --------------------------------------------------------------------------------------------

    def _open(self, geometry: Geometry) -> Attached:
        link = open_link(self._path, session=self._session, worker=self._worker, rank=self._rank, geometry=geometry)
        if self._on_mapped is not None:
            link.before_unmapping = self._on_mapped(link.view)
        with self._state:
            self._link = link
            self._is_usable = not self._is_closed
        return link.attached

    def _linked(self) -> RankLink:
        link = self._link
        if link is None:
            raise KvLost("the store is away")
        return link

    def _call(self, body: AnyCall) -> None:
        self._over_the_link(lambda link: link.call(body, Ok))

    def _call_all(self, bodies: Sequence[AnyCall]) -> list[Body]:
        return self._over_the_link(lambda link: link.call_all(bodies))

    def _over_the_link(self, call: Callable[[RankLink], T]) -> T:
        with self._state:
            link = self._link if self._is_usable else None
        if link is None:
            raise KvLost("the store is away")
        try:
            return call(link)
        except KvLost:
            # Perhaps only the lease is gone; perhaps the socket is, and then nothing on it can be trusted any more.
            if link.is_broken:
                with self._state:
                    self._is_usable = self._is_usable and self._link is not link
                    self._wake()
            raise

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # enough of them are waiting
            self._wake_in.send(b"w")

    # ---- the watch thread ------------------------------------------------------------------------------------

    def _watch_forever(self) -> None:
        while True:
            link = self._linked()
            try:
                self._watch(link)
            except (OSError, msgspec.DecodeError) as error:
                log.warning("kv: the store is away: %s", type(error).__name__)
            with self._state:
                self._is_usable = False
                self._state.wait_for(lambda: not self._copies)
                self._link = None
                self._answerable.clear()
            link.close()
            if not self._attach_again():
                return

    def _watch(self, link: RankLink) -> None:
        """Answer revokes until the link is given up."""
        poll = select.poll()
        poll.register(link.watch, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        while self._is_usable:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake_out.fileno() in ready:
                self._wake_out.recv(4096)
            if link.watch.fileno() in ready:
                body = read_answer(link.watch).body
                if isinstance(body, Revoke):
                    self._revoke(body.lease)
            with self._state:
                answerable, self._answerable = self._answerable, []
            for lease in answerable:
                link.tell(Revoked(lease=lease))

    def _revoke(self, lease: str) -> None:
        with self._state:
            self._revoked[lease] = None
            while len(self._revoked) > REMEMBERED_REVOKES:
                self._revoked.popitem(last=False)
            if lease not in self._copies:
                self._answerable.append(lease)

    def _attach_again(self) -> bool:
        """Returns False when closed meanwhile."""
        geometry = self._geometry
        backoff = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S, spread=(0.5, 1.0))  # ranks of many workers come back at once
        while geometry is not None:
            with self._state:
                if self._state.wait_for(lambda: self._is_closed, backoff.next_s()):
                    break
            try:
                attached = self._open(geometry)
            except BatonError as error:
                log.log(logging.ERROR if is_fatal(error) else logging.DEBUG, "kv: not attached: %s", error.message)
            else:
                log.info("kv: attached again, to %s", attached.arena)
                return True
        return False


def _reserved(body: Body) -> Reserved | BatonError:
    if isinstance(body, Reserved):
        return body
    return from_wire(body.code, body.message) if isinstance(body, Refusal) else KvLost("the store answered otherwise")

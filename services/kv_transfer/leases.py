"""What the store remembers about clients, and what it tells its server: sessions, leases, revocations, events."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import msgspec

from shared.errors import BatonError
from shared.kv.messages import Ready, Reserve, Reserved

Ticket = Hashable  # names a call that is answered later; chosen by the server


@dataclass(slots=True, eq=False)
class Lease:
    """One reservation. Per key: a block, and whether that block is committed and pinned by this lease.

    A position that is not ready has, under a write lease, a private block; otherwise a block that is set aside for
    whoever writes the key, or none while it is lent to such a writer.
    """

    id: str
    request: str
    session: str
    write: bool
    keys: list[bytes]
    traceparent: str
    blocks: list[int] = field(default_factory=list)
    ready: list[bool] = field(default_factory=list)
    missing: int = 0  # positions that are not ready
    alive: bool = True
    written: dict[int, int] = field(default_factory=dict)  # position -> bit set of the ranks that have committed it
    origins: dict[int, tuple["Lease", int]] = field(default_factory=dict)  # blocks lent by another lease: whose
    waits: set[Ticket] = field(default_factory=set)
    ends_complete: bool = False  # nobody releases it
    push_node: str = ""  # where its blocks are pushed as they are committed
    push_lease: str = ""  # of that node's store
    is_offered: bool = True  # that store has taken the offer, or nothing is pushed
    is_hopeless: bool = False  # nobody will bring what is missing: nothing is waited for

    @property
    def is_complete(self) -> bool:
        return self.missing == 0 and self.is_offered


@dataclass(slots=True, eq=False)
class Revocation:
    """A lease that is over, whose written blocks wait until every rank has said that it does not copy any more."""

    lease: Lease
    blocks: list[tuple[int, int]]  # (position, block)
    ranks: set[int]  # have not answered


@dataclass(slots=True, eq=False)
class Session:
    """One worker process with its engine ranks: everything that dies together."""

    id: str
    worker: str
    hosts: int = 0
    ranks: dict[int, int] = field(default_factory=dict)  # rank -> its open connections, of both kinds
    leases: dict[str, Lease] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    revocations: set[str] = field(default_factory=set)

    @property
    def is_gone(self) -> bool:
        return self.hosts == 0 and not self.ranks


@dataclass(slots=True)
class Queued:
    """A reservation that waits for room; it holds nothing."""

    session: Session
    call: Reserve
    ticket: Ticket


# ---- events: what the server must do after a call to the store ------------------------------------------------


class Answered(msgspec.Struct, frozen=True):
    """The late answer to a Reserve or Wait."""

    ticket: Ticket
    answer: Reserved | Ready | BatonError


class RevokeAsked(msgspec.Struct, frozen=True):
    """Push `Revoke` to the watch connections of these ranks; one that attaches later is asked then."""

    session: str
    lease: str
    ranks: frozenset[int]


class SessionUnhealthy(msgspec.Struct, frozen=True):
    """Push `Unhealthy` to the hosts of the session."""

    session: str
    reason: str


class HostClosed(msgspec.Struct, frozen=True):
    """The worker's last host connection closed: tell the bus."""

    worker: str


class Bound(msgspec.Struct, frozen=True):
    """A key got its block."""

    key: bytes


class Evicted(msgspec.Struct, frozen=True):
    """A key lost its block."""

    key: bytes


class LeaseEnded(msgspec.Struct, frozen=True):
    lease: str
    expired: bool


class PushBegun(msgspec.Struct, frozen=True):
    """A lease was granted whose blocks another node waits for."""

    lease: str


class PushReady(msgspec.Struct, frozen=True):
    """A block of such a lease has been committed."""

    lease: str
    position: int


class ArenaCut(msgspec.Struct, frozen=True):
    """The geometry is known (again): attaches that waited for it can be answered."""


Event = (
    Answered
    | RevokeAsked
    | SessionUnhealthy
    | HostClosed
    | Bound
    | Evicted
    | LeaseEnded
    | PushBegun
    | PushReady
    | ArenaCut
)

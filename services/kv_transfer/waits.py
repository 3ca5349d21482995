"""Who waits for a lease to be complete, and is answered then, at the time-out, or when there is nothing to wait for."""

from collections.abc import Callable

from services.kv_transfer.leases import Lease, Ticket
from shared.errors import KvLost
from shared.kv.messages import Ready

Answer = Callable[[Ticket, Ready | KvLost], None]


class Waits:
    """Pure. Invariant: each ticket is answered once, or dropped."""

    def __init__(self, ready: Callable[[Lease], Ready], answer: Answer, ended: Callable[[Ticket], None]) -> None:
        """Start with nobody.

        Args:
            ready: what a lease has.
            answer: takes the late answers.
            ended: told of each wait that is over, so that its deadline goes.
        """
        self._ready = ready
        self._answer = answer
        self._ended = ended
        self._leases: dict[Ticket, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, ticket: Ticket, lease: Lease) -> None:
        lease.waits.add(ticket)
        self._leases[ticket] = lease

    def resolve(self, lease: Lease) -> None:
        """Answer if there is nothing left to wait for."""
        if lease.waits and (lease.is_complete or lease.is_hopeless):
            for ticket in list(lease.waits):
                self.time_out(ticket)

    def time_out(self, ticket: Ticket) -> None:
        """With what there is. Unknown tickets are fine."""
        lease = self._leases.get(ticket)
        if lease is not None:
            self._answer(ticket, self._ready(lease))
            self.drop(ticket)

    def end(self, lease: Lease) -> None:
        """The lease is over."""
        for ticket in list(lease.waits):
            self._answer(ticket, KvLost("the lease is over"))
            self.drop(ticket)

    def drop(self, ticket: Ticket) -> None:
        """Nobody is left to read the answer. Unknown tickets are fine."""
        lease = self._leases.pop(ticket, None)
        if lease is not None:
            lease.waits.discard(ticket)
            self._ended(ticket)

"""Which tenants without a line were served of late: beside them, who has one gets no head start. Pure.

What is bound ahead of its time is out of the line: nobody can pass it any more, and a tenant that asks one at a time
would find a prompt of the other's before it at every worker. Tenants that all have lines take turns as it is, and keep
the head start. Invariant: what is remembered is bounded.
"""

ACTIVE_S = 2.0  # since it was served last
MOST_TENANTS = 1000  # remembered


class Crowd:
    def __init__(self) -> None:
        self._served_at: dict[str, float] = {}  # oldest first

    def served(self, tenant: str, now: float) -> None:
        self._served_at.pop(tenant, None)
        self._served_at[tenant] = now
        while self._served_at:
            oldest = next(iter(self._served_at))
            if len(self._served_at) <= MOST_TENANTS and now - self._served_at[oldest] < ACTIVE_S:
                break
            del self._served_at[oldest]

    def has_other(self, tenant: str, now: float) -> bool:
        """Was anybody else served of late?"""
        return any(now - at < ACTIVE_S for other, at in self._served_at.items() if other != tenant)

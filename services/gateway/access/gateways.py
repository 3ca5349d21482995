"""How many gateways there are, from their beats: pure, time is an argument.

Invariant: silence on the bus changes nothing. Who is silent while others are heard has gone; when nobody is heard, not
even this gateway itself, the bus stands still and the last count stays.
"""

GONE_S = 2.0  # ten beats


class GatewayCount:
    def __init__(self) -> None:
        self._heard_at: dict[str, float] = {}

    def hear(self, gateway: str, now: float) -> None:
        self._heard_at[gateway] = now
        self._heard_at = {one: at for one, at in self._heard_at.items() if now - at < GONE_S}

    def count(self) -> int:
        """At least 1: who asks is there."""
        return max(1, len(self._heard_at))

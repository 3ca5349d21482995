"""When a process that died may start again. Pure: lifetimes in, delay out."""

from shared.backoff import Backoff

FIRST_S = 1.0
LONGEST_S = 30.0
SETTLED_S = 300.0
MOST_DEATHS = 5


class Restarts:
    """1, 2, 4, 8 … 30 s; None once the process died MOST_DEATHS times in a row within SETTLED_S of its start."""

    def __init__(self) -> None:
        self._backoff = Backoff(FIRST_S, LONGEST_S)

    @property
    def deaths(self) -> int:
        return self._backoff.tries

    def after_death(self, lifetime_s: float) -> float | None:
        if lifetime_s > SETTLED_S:
            self._backoff.reset()
        delay_s = self._backoff.next_s()
        return None if self.deaths >= MOST_DEATHS else delay_s

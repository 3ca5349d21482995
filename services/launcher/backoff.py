"""When a process that died may start again. Pure: lifetimes in, delay out."""

LONGEST_S = 30.0
SETTLED_S = 300.0
MOST_DEATHS = 5


class Backoff:
    """1, 2, 4, 8 … 30 s; None once the process died MOST_DEATHS times in a row within SETTLED_S of its start."""

    def __init__(self) -> None:
        self.deaths = 0

    def after_death(self, lifetime_s: float) -> float | None:
        self.deaths = 1 if lifetime_s > SETTLED_S else self.deaths + 1
        if self.deaths >= MOST_DEATHS:
            return None
        return float(min(LONGEST_S, 2 ** (self.deaths - 1)))

"""How long to rest before the next try: longer each time, and a little by chance where many try at once."""

import random


class Backoff:
    """`first_s`, then twice as long each time, `last_s` at most; each times a random share within `spread`."""

    def __init__(self, first_s: float, last_s: float, *, spread: tuple[float, float] = (1.0, 1.0)) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._spread = spread
        self.tries = 0  # that were rested after

    def next_s(self) -> float:
        """Seconds to rest after a try that failed."""
        rest_s: float = min(self._last_s, self._first_s * 2.0 ** min(self.tries, 64))
        self.tries += 1
        return rest_s * random.uniform(*self._spread)  # noqa: S311 - no secret

    def reset(self) -> None:
        """A try went well."""
        self.tries = 0

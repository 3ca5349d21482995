"""Whether an engine still gives signs of life. Pure: time is an argument.

A sign is the end of a step, a delta, or the answer to a question that EngineCore's own loop answers between steps. So
an idle engine gives one at every question, a busy one at every step, and one that is stopped or stuck none at all,
with requests or without. Invariant: time in which nobody looked is not held against the engine: then it was this
process, or the whole machine, that stood still.
"""

AWAY_S = 5.0  # between two looks; they are a second apart while this process runs


class Liveness:
    def __init__(self, now: float) -> None:
        self._last_sign = now
        self._last_look = now

    def sign(self, now: float) -> None:
        self._last_sign = now

    def look(self, now: float) -> float:
        """Seconds without a sign."""
        gap_s = now - self._last_look
        self._last_look = now
        if gap_s > AWAY_S:
            self._last_sign = min(now, self._last_sign + gap_s)
        return now - self._last_sign

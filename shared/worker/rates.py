"""Measured speeds of one engine, as exponentially weighted means: placement and admission predict with them."""

WEIGHT = 0.2  # of the newest observation


class Rates:
    """0 until something has been measured."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0

    def prompt(self, tokens: int, seconds: float) -> None:
        """A prompt's uncached tokens and the time the engine spent on them. Tiny ones measure overhead only."""
        if tokens >= 16 and seconds > 0:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, tokens / seconds)

    def step(self, gap_s: float) -> None:
        """The gap between two tokens of one sequence."""
        if gap_s > 0:
            self.decode_step_s = _mean(self.decode_step_s, gap_s)


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + WEIGHT * (new - old)

"""What was decided for a request and what happened: the `x-baton-receipt` of design section 10."""

from collections.abc import Sequence

import msgspec

from services.gateway.placement import Placement
from services.gateway.states import Course, State

HEADER = b"x-baton-receipt"
STAGES = {"queue": State.QUEUED, "reserve": State.RESERVING}


class Receipt(msgspec.Struct, kw_only=True):
    """Compact JSON; null: not known yet."""

    path: str | None = None  # split | whole
    reason: str | None = None
    prefill: str | None = None
    decode: str | None = None
    cached_tokens: int = 0
    predicted_ttft_ms: float | None = None
    actual_ttft_ms: float | None = None
    retries: int = 0
    stages_ms: dict[str, float] | None = None  # where the time to the first token went; they add up to it

    def placed(self, placement: Placement, expected_s: float | None) -> None:
        """`expected_s`: what the time to the first token was first predicted to be, from the request's arrival."""
        self.path = placement.path
        self.reason = placement.reason
        self.prefill = placement.prefill
        self.decode = placement.decode
        if expected_s is not None and self.predicted_ttft_ms is None:
            self.predicted_ttft_ms = round(expected_s * 1000, 1)

    def first_token(self, course: Course, *, ttft_s: float, prefilled_at: float | None) -> None:
        """To be called on entering STREAMING. `prefilled_at`: when prefill was known to be done; None: never, or late.

        `prefill` is the wait for a computed prompt, `handoff` what follows until decode's first token; a prompt that
        decode computes itself is all `prefill`.
        """
        handoff_s = 0.0 if prefilled_at is None else max(0.0, course.since - prefilled_at)
        waited_s = course.spent_s.get(State.HANDOFF, 0.0)
        stages_s = {name: course.spent_s.get(state, 0.0) for name, state in STAGES.items()}
        stages_s |= {"prefill": max(0.0, waited_s - handoff_s), "handoff": min(handoff_s, waited_s)}
        # The rest went into reading, checking and tokenising.
        stages_s = {"edge": max(0.0, ttft_s - sum(stages_s.values())), **stages_s}
        self.stages_ms = {name: round(spent_s * 1000, 1) for name, spent_s in stages_s.items()}
        self.actual_ttft_ms = round(ttft_s * 1000, 1)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def comment(self) -> bytes:
        """For a stream, before its end."""
        return b": baton-receipt " + self.encode() + b"\n\n"


def merged(receipts: Sequence[Receipt]) -> Receipt:
    """One for a request with several prompts: the first one's way, the sums, and the first token of all."""
    first = receipts[0]
    if len(receipts) == 1:
        return first
    return msgspec.structs.replace(
        first,
        cached_tokens=sum(one.cached_tokens for one in receipts),
        actual_ttft_ms=min((one.actual_ttft_ms for one in receipts if one.actual_ttft_ms is not None), default=None),
        retries=sum(one.retries for one in receipts),
    )

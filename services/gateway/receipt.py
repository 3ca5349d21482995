"""What was decided for a request and what happened: the `x-baton-receipt` of design section 10."""

from collections.abc import Sequence

import msgspec

from services.gateway.placement import Placement

HEADER = b"x-baton-receipt"


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

    def placed(self, placement: Placement) -> None:
        self.path = placement.path
        self.reason = placement.reason
        self.prefill = placement.prefill
        self.decode = placement.decode
        if placement.predicted_ttft_s is not None:
            self.predicted_ttft_ms = round(placement.predicted_ttft_s * 1000, 1)

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

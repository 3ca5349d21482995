"""The `x-baton-receipt` of design section 10: what was decided for a request, and what happened."""

import msgspec

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
    stages_ms: dict[str, float] | None = None  # where the time to the first token went; they add up to it

    def comment(self) -> bytes:
        """For a stream, before its end."""
        return b": baton-receipt " + msgspec.json.encode(self) + b"\n\n"

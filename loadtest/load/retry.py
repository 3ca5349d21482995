"""When a client tries again, and how long it waits first: as the official OpenAI client does it. Pure.

Source: `openai/_base_client.py`, `_should_retry` and `_calculate_retry_timeout` of openai 3.52; a unit test asks that
package the same questions.
"""

import email.utils
import math
from collections.abc import Mapping

from loadtest.load.answer import Outcome

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 120.0  # a server that asks for more is not asked again; clients before openai 3 stop at 60
JITTER = 0.25  # a wait is shortened by up to this share
MAX_DOUBLINGS = 1000
_INFINITIES = (b"inf", b"+inf", b"infinity", b"+infinity")


def retryable(outcome: Outcome, status: int | None, headers: Mapping[bytes, bytes], now_s: float) -> bool:
    """`now_s`: since the epoch, for dates. An answer that has begun to stream is never asked for again."""
    if status is None:
        return outcome in (Outcome.UNREACHABLE, Outcome.TIMEOUT)
    if status < 400:
        return False
    wanted = retry_after_s(headers, now_s)
    if wanted is not None and math.isfinite(wanted) and wanted > MAX_RETRY_AFTER_S:
        return False
    said = headers.get(b"x-should-retry")
    if said in (b"true", b"false"):
        return said == b"true"
    return status in (408, 409, 429) or status >= 500


def delay_s(retries_taken: int, headers: Mapping[bytes, bytes], now_s: float, draw: float) -> float:
    """`draw`: uniform in [0, 1)."""
    wanted = retry_after_s(headers, now_s)
    if wanted is not None and math.isfinite(wanted) and 0 < wanted <= MAX_RETRY_AFTER_S:
        return wanted
    backoff_s = min(FIRST_DELAY_S * 2.0 ** min(retries_taken, MAX_DOUBLINGS), MAX_DELAY_S)
    return float(backoff_s * (1 - JITTER * draw))


def retry_after_s(headers: Mapping[bytes, bytes], now_s: float) -> float | None:
    """Milliseconds first, then seconds, then a date; None for what is none of these."""
    for name, parts in ((b"retry-after-ms", 1000), (b"retry-after", 1)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            delay = float(value)
        except ValueError:
            continue
        if delay == math.inf and value.strip().lower() not in _INFINITIES:
            return MAX_RETRY_AFTER_S + 1  # too large for a float is too long, not malformed
        return delay / parts
    date = email.utils.parsedate_tz(headers.get(b"retry-after", b"").decode("latin-1"))
    try:
        return None if date is None else email.utils.mktime_tz(date) - now_s
    except (ValueError, OverflowError):
        return None

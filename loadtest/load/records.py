"""What a driver writes down about each request, and how the drivers' notes become one table. Pure.

A request's events are kept as seconds since its intended time, in one flat array of 32-bit floats: 4 bytes a token,
exact to a few microseconds for a minute-long answer.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from loadtest.slo import Floats, Ints


class Try(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One attempt that was refused or that failed. `retry_after_s`: what the server asked for.

    `queued_s`: how long the request had waited in line, where the server says so.
    """

    sent_s: float
    end_s: float
    outcome: str
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None
    queued_s: float | None = None


class Row(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """One offered request. Seconds since the driver's start, `ttft_s` since `intended_s`; `events` that had text.

    `sent_s` is the first attempt's, `last_sent_s` that of the attempt which the rest of the row is about; `tries` are
    all that failed, that one too if it did. `predicted_ttft_s`, `actual_ttft_s`: as the server's receipt says.
    """

    intended_s: float
    sent_s: float | None = None
    last_sent_s: float | None = None
    ttft_s: float | None = None
    end_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    outcome: str = ""
    status: int | None = None
    code: str = ""
    attempts: int = 0
    path: str = ""
    retries: int | None = None
    stages_s: dict[str, float] | None = None
    predicted_ttft_s: float | None = None
    actual_ttft_s: float | None = None
    tries: list[Try] = []
    events: int = 0


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """All that one driver has to tell at its end. `offsets`: float32, of all rows' events in the order of rows."""

    rows: list[Row]
    offsets: bytes
    cpu_s: float
    clipped: int = 0
    no_connection: int = 0
    verified: int = 0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """All rows by intended time, and all gaps between events of one row.

    `gap_row`: the row of each gap, ascending; `event_row` and `event_s`: of each event, seconds since the start.
    """

    rows: list[Row]
    event_row: Ints
    event_s: Floats
    gap_row: Ints
    gap_s: Floats
    gap_end_s: Floats


def merged(shares: Sequence[Share]) -> Table:
    """Rows of equal intended time stay in the drivers' order."""
    rows = [row for share in shares for row in share.rows]
    order = np.argsort(np.array([row.intended_s for row in rows], dtype=np.float64), kind="stable")
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows))
    offsets = np.concatenate(
        [np.frombuffer(share.offsets, dtype=np.float32) for share in shares] or [np.empty(0, np.float32)]
    )
    event_row = np.repeat(place, np.array([row.events for row in rows], dtype=np.int64))
    by_row = np.argsort(event_row, kind="stable")
    ranked = [rows[index] for index in order]
    return _table(ranked, event_row[by_row], offsets[by_row].astype(np.float64))


def _table(rows: list[Row], event_row: Ints, offsets: Floats) -> Table:
    starts = np.array([row.intended_s for row in rows], dtype=np.float64)
    event_s = offsets + starts[event_row] if len(event_row) else np.empty(0)
    inside = event_row[1:] == event_row[:-1]
    return Table(
        rows=rows,
        event_row=event_row,
        event_s=event_s,
        gap_row=event_row[1:][inside],
        gap_s=np.diff(offsets)[inside],
        gap_end_s=event_s[1:][inside],
    )

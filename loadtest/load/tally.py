"""From the table of a run to the columns, the timeline and the summary of result.json. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from loadtest.load.answer import Outcome
from loadtest.load.records import Row, Table
from loadtest.result import Column, Counts, Lateness, Requests, Summary, Timeline, Tries
from loadtest.slo import Bools, Floats, Ints, Slo, good, percentiles, ranks, spread, steady

BUCKETS = 600  # at most about so many
DIGITS = 6  # microseconds
FAILED = frozenset(Outcome) - {Outcome.OK, Outcome.SHED, Outcome.LEFT}


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    summary: Summary
    requests: Requests
    timeline: Timeline
    lateness: Lateness
    tries: Tries


def tally(table: Table, slo: Slo, duration_s: float) -> Tally:
    """`duration_s`: from the run's start to its last answer."""
    gaps = _Gaps(table)
    rows = table.rows
    ttft = _floats([row.ttft_s for row in rows])
    ok = np.array([row.outcome == Outcome.OK for row in rows], dtype=bool)
    in_time = gaps.within(slo.itl_s)
    judged = good(ok, ttft, gaps.counts, in_time, slo)
    return Tally(
        summary=_summary(table, ok, judged, ttft, duration_s),
        requests=_requests(rows, gaps, judged, steady(gaps.counts, in_time, slo)),
        timeline=_timeline(table, ok, judged, ttft, duration_s),
        lateness=_lateness(rows),
        tries=_tries(rows),
    )


class _Gaps:
    """Gaps by row, ranked within each."""

    def __init__(self, table: Table) -> None:
        self._rows = len(table.rows)
        self._gap_row, self._gap_s = table.gap_row, table.gap_s
        self.counts: Ints = np.bincount(table.gap_row, minlength=self._rows).astype(np.int64)
        self._ranked = table.gap_s[np.lexsort((table.gap_s, table.gap_row))]
        self._starts = np.cumsum(self.counts) - self.counts

    def within(self, limit_s: float) -> Ints:
        # Offsets are 32-bit floats: a gap of exactly the limit must not lose by their rounding.
        return np.bincount(self._gap_row[self._gap_s <= limit_s + 1e-6], minlength=self._rows).astype(np.int64)

    def at(self, share: float) -> Column:
        """This percentile of every row."""
        found: Column = [None] * self._rows
        some = np.flatnonzero(self.counts)
        values = self._ranked[(self._starts + ranks(share, self.counts))[some]]
        for row, value in zip(some.tolist(), values.tolist(), strict=True):
            found[row] = round(value, DIGITS)
        return found


def _requests(rows: Sequence[Row], gaps: _Gaps, judged: Bools, even: Bools) -> Requests:
    def seconds(read: Callable[[Row], float | None]) -> Column:
        return [_rounded(read(row)) for row in rows]

    def counts(read: Callable[[Row], int | None]) -> Counts:
        return [read(row) for row in rows]

    def stage(name: str) -> Column:
        return seconds(lambda row: (row.stages_s or {}).get(name))

    stages = sorted({name for row in rows for name in row.stages_s or ()})
    return Requests(
        intended_s=[round(row.intended_s, DIGITS) for row in rows],
        sent_s=seconds(lambda row: row.sent_s),
        ttft_s=seconds(lambda row: row.ttft_s),
        end_s=seconds(lambda row: row.end_s),
        prompt_tokens=counts(lambda row: row.prompt_tokens),
        output_tokens=counts(lambda row: row.output_tokens),
        cached_tokens=counts(lambda row: row.cached_tokens),
        outcome=[row.outcome for row in rows],
        status=counts(lambda row: row.status),
        code=[row.code for row in rows],
        attempts=[row.attempts for row in rows],
        path=[row.path for row in rows],
        retries=counts(lambda row: row.retries),
        itl_p50_s=gaps.at(0.5),
        itl_p99_s=gaps.at(0.99),
        itl_max_s=gaps.at(1.0),
        good=judged.tolist(),
        stages={name: stage(name) for name in stages},
        last_sent_s=seconds(lambda row: row.last_sent_s),
        steady=even.tolist(),
        predicted_ttft_s=_if_any(seconds(lambda row: row.predicted_ttft_s)),
        actual_ttft_s=_if_any(seconds(lambda row: row.actual_ttft_s)),
    )


def _tries(rows: Sequence[Row]) -> Tries:
    told = [(place, number, one) for place, row in enumerate(rows) for number, one in enumerate(row.tries)]
    return Tries(
        request=[place for place, _, _ in told],
        number=[number for _, number, _ in told],
        sent_s=[round(one.sent_s, DIGITS) for _, _, one in told],
        end_s=[round(one.end_s, DIGITS) for _, _, one in told],
        outcome=[one.outcome for _, _, one in told],
        status=[one.status for _, _, one in told],
        code=[one.code for _, _, one in told],
        retry_after_s=[_rounded(one.retry_after_s) for _, _, one in told],
        queued_s=[_rounded(one.queued_s) for _, _, one in told],
    )


def _summary(table: Table, ok: Bools, judged: Bools, ttft: Floats, duration_s: float) -> Summary:
    rows = table.rows
    offered, completed, kept = len(rows), int(ok.sum()), int(judged.sum())
    tokens = sum(_tokens(row) for row in rows)
    seconds = max(duration_s, 1e-9)
    whole = [row.end_s - row.intended_s for row in rows if row.outcome == Outcome.OK and row.end_s is not None]
    return Summary(
        offered=offered,
        completed=completed,
        good=kept,
        goodput_per_s=kept / seconds,
        good_share=kept / offered if offered else None,
        requests_per_s=completed / seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_s=spread(ttft[~np.isnan(ttft)]),
        itl_s=spread(table.gap_s),
        e2e_s=spread(whole),
        outcomes=_counted(row.outcome for row in rows),
        shed=_counted(row.code for row in rows if row.outcome == Outcome.SHED),
        errors=_counted(row.code or row.outcome for row in rows if row.outcome in FAILED),
        cached_tokens=sum(row.cached_tokens or 0 for row in rows),
        prompt_tokens=sum(row.prompt_tokens or 0 for row in rows),
        output_tokens=tokens,
    )


def _timeline(table: Table, ok: Bools, judged: Bools, ttft: Floats, duration_s: float) -> Timeline:
    rows = table.rows
    bucket_s = float(max(1, int(np.ceil(duration_s / BUCKETS))))
    count = max(1, int(np.ceil(duration_s / bucket_s)))
    intended, ended = _floats([row.intended_s for row in rows]), _floats([row.end_s for row in rows])
    shed = np.array([row.outcome == Outcome.SHED for row in rows], dtype=bool)
    failed = np.array([row.outcome in FAILED for row in rows], dtype=bool)

    def buckets(times_s: Floats) -> Ints:
        return np.clip((times_s / bucket_s).astype(np.int64), 0, count - 1)

    def happened(times_s: Floats, weights: Floats | None = None) -> list[int]:
        known = ~np.isnan(times_s)
        weights = None if weights is None else weights[known]
        return [round(value) for value in np.bincount(buckets(times_s[known]), weights, minlength=count).tolist()]

    first = ~np.isnan(ttft)
    ttfts = _by_bucket(buckets((intended + ttft)[first]), ttft[first], count, (0.5, 0.9, 0.99))
    itls = _by_bucket(buckets(table.gap_end_s), table.gap_s, count, (0.5, 0.99))
    # An event may carry several tokens: what the server counted is spread over its events.
    weight = np.array([_tokens(row) / max(1, row.events) for row in rows], dtype=np.float64)
    return Timeline(
        bucket_s=bucket_s,
        t_s=[number * bucket_s for number in range(count)],
        offered=happened(intended),
        completed=happened(ended[ok]),
        good=happened(ended[judged]),
        shed=happened(ended[shed]),
        failed=happened(ended[failed]),
        tokens=happened(table.event_s, weight[table.event_row]),
        ttft_p50_s=ttfts[0],
        ttft_p90_s=ttfts[1],
        ttft_p99_s=ttfts[2],
        itl_p50_s=itls[0],
        itl_p99_s=itls[1],
    )


def _by_bucket(bucket: Ints, values: Floats, count: int, shares: Sequence[float]) -> list[Column]:
    """One column a share."""
    order = np.lexsort((values, bucket))
    edges = np.searchsorted(bucket[order], np.arange(1, count))
    parts = [percentiles(part, shares) for part in np.split(values[order], edges)]
    return [
        [None if part[place] is None else round(part[place], DIGITS) for part in parts]  # type: ignore[arg-type]
        for place in range(len(shares))
    ]


def _lateness(rows: Sequence[Row]) -> Lateness:
    late = spread([row.sent_s - row.intended_s for row in rows if row.sent_s is not None])
    return Lateness(p50=late.p50, p99=late.p99, max=late.max)


def _tokens(row: Row) -> int:
    return row.events if row.output_tokens is None else row.output_tokens


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _if_any(column: Column) -> Column | None:
    return column if any(value is not None for value in column) else None


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())

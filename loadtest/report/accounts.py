"""What became of each offered request, and where the time of the finished ones went.

Invariants: the verdicts of a run add up to what was offered; a request's parts add up to its time from the intended
send to its end.
"""

from collections import Counter
from collections.abc import Sequence

from loadtest.report.series import Column, known, mean
from loadtest.result import Requests, Result

# In the order in which a bar shows them: colour name, and what a reader is told.
VERDICTS = {
    "good": ("green", "good, finished within the SLO"),
    "late": ("sky", "finished, but the first token came late"),
    "slow": ("purple", "finished, but tokens came too slowly"),
    "shed": ("orange", "shed by the server (429, 503)"),
    "failed": ("red", "failed (error, cut, timeout, wrong text, unreachable)"),
    "left": ("grey", "the client left on purpose"),
    "unfinished": ("black", "not finished when the run ended"),
}
REST, DECODE, WHOLE = "other", "decode", "until first token"
# In the order in which a request meets them; stages that a server should name beside these follow.
STAGE_COLOURS = {
    "edge": "black",
    "queue": "orange",
    "reserve": "purple",
    "prefill": "sky",
    "handoff": "green",
    REST: "grey",
    WHOLE: "yellow",
    DECODE: "blue",
}
STAGE_TEXTS = {
    "edge": "edge: reading and tokenising in the gateway",
    "queue": "queue: waiting in the gateway",
    "reserve": "reserve: until decode has its slots",
    "prefill": "prefill: until the prompt is computed",
    "handoff": "handoff: from prefill's end to decode's first token",
    REST: "other, until the first token: client and network",
    WHOLE: "until the first token: this run recorded no stages",
    DECODE: "decode: from the first token to the last",
}
SPARE_COLOURS = ("red", "yellow", "pale")


def verdicts(result: Result) -> dict[str, int]:
    """How many requests ended in each way; the keys of VERDICTS, zeros included."""
    requests = result.requests
    found = Counter(
        _verdict(outcome, ttft_s, good, result.slo.ttft_s)
        for outcome, ttft_s, good in zip(requests.outcome, requests.ttft_s, requests.good, strict=True)
    )
    return {name: found[name] for name in VERDICTS}


def _verdict(outcome: str | None, ttft_s: float | None, good: bool | None, ttft_bound_s: float) -> str:
    if not outcome:
        return "unfinished"
    if outcome == "ok":
        if good:
            return "good"
        return "late" if ttft_s is None or ttft_s > ttft_bound_s else "slow"
    return outcome if outcome in ("shed", "left") else "failed"


def finished(requests: Requests, column: Column) -> list[float | None]:
    """The column with only the requests that finished."""
    return [value if outcome == "ok" else None for value, outcome in zip(column, requests.outcome, strict=True)]


def whole_s(requests: Requests) -> list[float | None]:
    """From the intended send to the end, of each request that finished."""
    times_s = [
        None if end_s is None else end_s - intended_s
        for end_s, intended_s in zip(requests.end_s, requests.intended_s, strict=True)
    ]
    return finished(requests, times_s)


def longest_gaps_s(requests: Requests) -> list[float | None]:
    """The p99 gap of each finished request. One of a single token has no gap: it meets every bound that any meets."""
    least_s = min(known(requests.itl_p99_s), default=0.0)
    gaps_s = [least_s if gap_s is None else gap_s for gap_s in requests.itl_p99_s]
    return finished(requests, gaps_s)


def stage_names(requests: Requests) -> list[str]:
    """The parts of a request's time, in order. Without recorded stages: first token and decode."""
    recorded = [name for name, column in requests.stages.items() if name != DECODE and known(column)]
    order = list(STAGE_COLOURS)
    recorded.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [*recorded, REST, DECODE] if recorded else [WHOLE, DECODE]


def stage_colours(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in STAGE_COLOURS]
    spare = {name: SPARE_COLOURS[place % len(SPARE_COLOURS)] for place, name in enumerate(unknown)}
    return [spare.get(name) or STAGE_COLOURS[name] for name in names]


def parts_s(requests: Requests, names: Sequence[str]) -> list[list[float]]:
    """A row of seconds per finished request, in the order of `names`.

    The stages are the server's and the first token is the client's clock: a stage that would reach past the first
    token is cut there, so that rows add up to what the client saw.
    """
    columns = [requests.stages.get(name) for name in names[:-2]] if REST in names else []
    rows = []
    for place, outcome in enumerate(requests.outcome):
        ttft_s, end_s = requests.ttft_s[place], requests.end_s[place]
        if outcome != "ok" or ttft_s is None or end_s is None:
            continue
        left_s, row = max(ttft_s, 0.0), []
        for column in columns:
            spent_s = min(max((column[place] if column else None) or 0.0, 0.0), left_s)
            left_s -= spent_s
            row.append(spent_s)
        rows.append([*row, left_s, max(end_s - requests.intended_s[place] - ttft_s, 0.0)])
    return rows


def mean_parts_s(rows: Sequence[Sequence[float]]) -> list[float]:
    return [mean(column) for column in zip(*rows, strict=True)]


def slowest(rows: Sequence[Sequence[float]], one_in: int = 100) -> list[Sequence[float]]:
    """The slowest hundredth of the rows by their sum; at least one where there are any."""
    return sorted(rows, key=sum)[-max(1, len(rows) // one_in) :] if rows else []

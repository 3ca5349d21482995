"""What a terminal shows while a run goes on, and at its end."""

import time
from collections import deque
from collections.abc import Callable

from loadtest.load.drive import PROGRESS_S, Progress
from loadtest.result import Result
from loadtest.slo import Spread, percentile

LINE_S = 2.0
WINDOW_S = 5.0  # of the TTFT and the token rate shown


class Board:
    """The drivers' reports, added up. Time is an argument."""

    def __init__(self, drivers: int) -> None:
        self._latest: list[Progress | None] = [None] * drivers
        self._recent: deque[tuple[float, int, list[float]]] = deque()

    def heard(self, part: int, progress: Progress, at_s: float) -> None:
        self._latest[part] = progress
        self._recent.append((at_s, progress.tokens, progress.ttfts_s))

    def line(self, at_s: float, total: int | None) -> str:
        """`at_s`: since the start. `total`: requests of the whole run, where known."""
        while self._recent and self._recent[0][0] < at_s - WINDOW_S:
            self._recent.popleft()
        known = [progress for progress in self._latest if progress is not None]
        sent, done, shed, failed = (sum(getattr(p, name) for p in known) for name in ("sent", "done", "shed", "failed"))
        ttft_s = percentile([ttft for _, _, ttfts in self._recent for ttft in ttfts], 0.5)
        tokens = sum(tokens for _, tokens, _ in self._recent)
        reported_s = PROGRESS_S * len(self._recent) / len(self._latest)
        rate = tokens / reported_s if reported_s else 0.0
        of = f"/{total}" if total is not None else ""
        return (
            f"{at_s:6.0f} s  sent {sent}{of}  in flight {sent - done - shed - failed}  done {done}  shed {shed}  "
            f"failed {failed}  {rate:,.0f} tok/s  TTFT p50 {_ms(ttft_s)}"
            + ("  comparing texts" if known and all(p.comparing for p in known) else "")
        )


class Printer:
    """Prints a line every two seconds; call it often."""

    def __init__(self, board: Board, total: int | None, say: Callable[[str], None]) -> None:
        self._board, self._total, self._say = board, total, say
        self._next_s = LINE_S

    def tick(self, at_s: float) -> None:
        if at_s >= self._next_s:
            self._next_s = at_s + LINE_S
            self._say(self._board.line(at_s, self._total))


def summary(result: Result) -> str:
    found, client, slo = result.summary, result.client, result.slo
    share = "-" if found.good_share is None else f"{100 * found.good_share:.1f} %"
    engine = f"{result.target.engine} {result.target.profile}".strip()
    lines = [
        "",
        (
            f"{result.name} on {result.target.model} (engine {engine}, arrangement {result.target.arrangement}), "
            f"{result.duration_s:.1f} s"
        ),
        (
            f"  offered {found.offered}  completed {found.completed}  good {found.good} ({share}; "
            f"TTFT <= {slo.ttft_s:g} s, {100 * slo.itl_share:g} % of gaps <= {1e3 * slo.itl_s:g} ms)"
        ),
        (
            f"  goodput {found.goodput_per_s:.2f}/s  answered {found.requests_per_s:.2f}/s  "
            f"{found.output_tokens_per_s:,.0f} tok/s"
        ),
        f"  prompt tokens {found.prompt_tokens:,}, of these {found.cached_tokens:,} cached",
        _spread("TTFT", found.ttft_s),
        _spread("ITL", found.itl_s),
        _spread("whole", found.e2e_s),
        f"  outcomes {_counts(found.outcomes)}",
    ]
    if found.shed:
        lines.append(f"  shed {_counts(found.shed)}")
    if found.errors:
        lines.append(f"  errors {_counts(found.errors)}")
    late = client.lateness_s
    lines.append(
        f"  generator: {client.processes} processes, {100 * client.cpu_share:.0f} % of a core, "
        f"late by p50 {_ms(late.p50)} p99 {_ms(late.p99)} max {_ms(late.max)}"
        + (f", {client.rejected_by_client} found no socket" if client.rejected_by_client else "")
    )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def started() -> str:
    """Now, ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _spread(name: str, values: Spread) -> str:
    parts = (("p50", values.p50), ("p90", values.p90), ("p95", values.p95), ("p99", values.p99), ("max", values.max))
    return f"  {name:6}" + "".join(f"{label} {_ms(value):>10}  " for label, value in parts).rstrip()


def _counts(counts: dict[str, int]) -> str:
    return "  ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:,.2f} ms" if seconds < 0.1 else f"{1e3 * seconds:,.0f} ms"

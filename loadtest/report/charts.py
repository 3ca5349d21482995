"""The charts that a page of one run and a comparison have in common, made from columns."""

import re
from collections.abc import Sequence

from loadtest.report import blocks, series
from loadtest.report.blocks import Axis, Chart, Mark, Series
from loadtest.report.quantities import bound
from loadtest.report.series import Column

TIME = Axis("time since the run's start (s)", "s")
RUN_COLOURS = ("blue", "orange", "green", "purple", "sky", "black")
# Beyond the palette's length the colours come again with another dash: never two alike lines.
DASHES: tuple[tuple[int, ...], ...] = ((), (8, 4), (2, 3), (10, 3, 2, 3))


def spread(labels: Sequence[str], colours: Sequence[str] = RUN_COLOURS) -> list[Series]:
    """A line for each label, no two alike."""
    return [
        Series(label, colours[place % len(colours)], DASHES[place // len(colours) % len(DASHES)])
        for place, label in enumerate(labels)
    ]


def latency_over_time(
    title: str, times_s: Sequence[float], lines: Sequence[Series], columns: Sequence[Column], slo_s: float | None
) -> Chart:
    """Durations in seconds by bucket; the SLO's bound is drawn where it is not far off."""
    bounds = [] if slo_s is None else [Mark("y", slo_s, f"SLO {bound(slo_s)}")]
    near = blocks.marks_within(bounds, columns)
    away = bool(bounds) and not near and any(series.known(column) for column in columns)
    unit, factor = blocks.time_unit([*columns, [mark.at for mark in near]])
    return Chart(
        title=title,
        caption=f"{bounds[0].label} is far above this chart." if away else "",
        x=TIME,
        y=Axis(f"{_quantity(title)} ({unit})", unit),
        series=list(lines),
        columns=[blocks.rounded(times_s, 7), *(blocks.rounded(blocks.scaled(c, factor)) for c in columns)],
        marks=[Mark(mark.axis, mark.at * factor, mark.label) for mark in near],
        sync="time",
    )


def over_time(
    title: str,
    times_s: Sequence[float],
    lines: Sequence[Series],
    columns: Sequence[Column],
    y: Axis,
    *,
    stacked: bool = False,
    caption: str = "",
) -> Chart:
    return Chart(
        title=title,
        caption=caption,
        x=TIME,
        y=y,
        series=list(lines),
        columns=[blocks.rounded(times_s, 7), *map(blocks.rounded, columns)],
        stacked=stacked,
        sync="time",
    )


def _quantity(title: str) -> str:
    """What a chart's vertical axis shows, as its title says it: "TTFT" of "TTFT over time"."""
    return re.split(r" over | by ", title, maxsplit=1)[0]


def percentiles(title: str, lines: Sequence[Series], columns: Sequence[Column], caption: str = "") -> Chart:
    """Values by percentile on an axis where every nine has the same width."""
    positions = series.nines_positions([len(series.known(column)) for column in columns])
    curves = [series.percentile_curve(column, positions) for column in columns]
    unit, factor = blocks.time_unit(curves)
    return Chart(
        title=title,
        caption=caption,
        x=Axis("percentile (%)", "%", "nines"),
        y=Axis(f"{_quantity(title)} ({unit})", unit),
        series=list(lines),
        columns=[blocks.rounded(positions, 5), *(blocks.rounded(blocks.scaled(c, factor)) for c in curves)],
    )


def within(
    title: str,
    x_label: str,
    *,
    lines: Sequence[Series],
    columns: Sequence[tuple[Column, int]],
    slo_s: float,
    caption: str = "",
) -> Chart:
    """The share of all offered requests whose value is known and within a bound, over that bound."""
    least_s = 1e-4  # a logarithmic axis has no zero
    clipped = [[None if v is None else max(v, least_s) for v in column] for column, _ in columns]
    limits = series.bounds(clipped)
    # The SLO's bound is a point of the curve, so that the value under the pointer there is exact.
    limits = sorted({*limits, max(slo_s, least_s)}) if limits else []
    shares = [series.share_within(c, total, limits) for c, (_, total) in zip(clipped, columns, strict=True)]
    unit, factor = blocks.time_unit([limits])
    return Chart(
        title=title,
        caption=caption,
        x=Axis(f"{x_label} ({unit})", unit, "log"),
        y=Axis("share of offered requests (%)", "%"),
        series=list(lines),
        columns=[
            blocks.rounded([limit * factor for limit in limits], 5),
            *(blocks.rounded(blocks.scaled(share, 100)) for share in shares),
        ],
        marks=[Mark("x", slo_s * factor, f"SLO {bound(slo_s)}")],
    )

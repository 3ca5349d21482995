"""What a page is made of: sections of tables, bars, charts and plain text. The template knows these and no more."""

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec

from loadtest.report import quantities
from loadtest.report.series import Column, known


class Axis(msgspec.Struct, frozen=True):
    label: str  # with its unit
    unit: str = ""  # after a value under the pointer
    scale: Literal["linear", "log", "nines"] = "linear"


class Series(msgspec.Struct, frozen=True):
    label: str
    colour: str  # a name of the page's palette
    dash: tuple[int, ...] = ()
    fill: bool = False
    dots: bool = False  # values that follow no course: no line between them


class Mark(msgspec.Struct, frozen=True):
    """A straight line across the chart, such as a bound of the SLO."""

    axis: Literal["x", "y"]
    at: float
    label: str


class Chart(msgspec.Struct, frozen=True, kw_only=True, tag="chart", tag_field="kind"):
    title: str
    caption: str = ""
    x: Axis
    y: Axis
    series: list[Series]
    columns: list[list[float | None]]  # x first
    marks: list[Mark] = []
    stacked: bool = False
    sync: str = ""  # charts of one word share the pointer and the zoom

    @property
    def empty(self) -> bool:
        return not any(known(column) for column in self.columns[1:])


class Cell(msgspec.Struct, frozen=True):
    text: str
    note: str = ""
    tone: str = ""  # "", "better", "worse"


class Table(msgspec.Struct, frozen=True, kw_only=True, tag="table", tag_field="kind"):
    title: str
    head: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    numeric: bool = True  # all columns but the first are numbers


class Part(msgspec.Struct, frozen=True):
    name: str
    colour: str
    text: str  # the value with its unit
    share: float  # of the bar, 0 to 1

    @property
    def brief(self) -> str:
        """What a narrow part has room for."""
        return quantities.share(self.share)


class Bar(msgspec.Struct, frozen=True):
    label: str
    note: str
    parts: list[Part]
    length: float = 1.0  # of the room there is


class Bars(msgspec.Struct, frozen=True, kw_only=True, tag="bars", tag_field="kind"):
    """Bars divided into shares."""

    title: str
    legend: list[tuple[str, str]]  # colour, text
    bars: list[Bar]
    caption: str = ""


class Code(msgspec.Struct, frozen=True, kw_only=True, tag="code", tag_field="kind"):
    title: str
    text: str


Block = Chart | Table | Bars | Code


class Tile(msgspec.Struct, frozen=True):
    label: str
    value: str
    note: str


class Engine(msgspec.Struct, frozen=True):
    """The strip under the title: which engine ran, said so that nobody takes a simulation for a model."""

    kind: str  # vllm, sim, unknown
    text: str
    note: str
    label: str = ""  # of the run, where the page has several


class Section(msgspec.Struct, frozen=True):
    title: str
    blocks: Sequence[Block]
    intro: str = ""
    folded: bool = False

    @property
    def placed(self) -> list[tuple[Block, str]]:
        """Each block with its width: narrow ones stand two in a row, three where three tables follow each other."""
        found: list[tuple[Block, str]] = []
        for narrow, group in itertools.groupby(self.blocks, _is_narrow):
            row = list(group)
            widths = ["half" if narrow else "wide"] * len(row)
            if narrow and len(row) == 3 and all(isinstance(block, Table) for block in row):
                widths = ["third"] * 3
            elif narrow and len(row) % 2:
                widths[-1] = "wide"
            found += zip(row, widths, strict=True)
        return found


def _is_narrow(block: Block) -> bool:
    return isinstance(block, Chart) or (isinstance(block, Table) and len(block.head) <= 3)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    title: str
    subtitle: str
    engines: list[Engine]
    warnings: list[str]
    tiles: list[Tile]
    sections: list[Section]


def texts(*values: str) -> list[Cell]:
    return [Cell(value) for value in values]


def rounded(column: Column, digits: int = 4) -> list[float | None]:
    """Enough digits for a screen: the page stays small."""
    return [None if value is None else float(f"{value:.{digits}g}") for value in column]


def time_unit(columns: Sequence[Column]) -> tuple[str, float]:
    """The unit in which these durations in seconds are drawn, and its factor."""
    largest = max((value for column in columns for value in known(column)), default=0.0)
    return ("s", 1.0) if largest >= 1 else ("ms", 1e3)


def scaled(column: Column, factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in column]


def marks_within(marks: Sequence[Mark], columns: Sequence[Column]) -> list[Mark]:
    """The marks near enough to the data to be drawn: a distant one would press the data flat."""
    largest = max((value for column in columns for value in known(column)), default=0.0)
    return [mark for mark in marks if mark.axis == "x" or mark.at <= 3 * largest]

"""Reads the runs that a report is about. What is wrong with one ends in a line naming the file and the field."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadtest.result import FILE, SCHEMA, Result
from shared.errors import SettingsError

LARGE_BYTES = 30_000_000  # from here on it takes more than a moment
MOST_RUNS = 6  # as many lines as a chart can show and a palette can tell apart


class _Version(msgspec.Struct):
    schema: int


@dataclass(frozen=True)
class Run:
    """One result with the name by which the page calls it: the folder's, made unique."""

    label: str
    path: Path
    result: Result


def read_runs(paths: list[Path]) -> list[Run]:
    """Raises SettingsError for whatever cannot be read."""
    if len(paths) > MOST_RUNS:
        raise SettingsError(f"{len(paths)} runs are too many for one page: give at most {MOST_RUNS}")
    files = [path / FILE if path.is_dir() else path for path in paths]
    results = [read(file) for file in files]
    return [
        Run(label, file, result) for label, file, result in zip(_labels(files, results), files, results, strict=True)
    ]


def read(file: Path) -> Result:
    """Raises SettingsError that names the file and the field."""
    try:
        size_bytes = file.stat().st_size
        if size_bytes > LARGE_BYTES:
            print(f"reading {file} ({size_bytes / 1e6:,.0f} MB) ...", file=sys.stderr, flush=True)
        text = file.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{file}: cannot be read: {error.strerror}; give a run's folder or its result.json"
        ) from None
    try:
        version = msgspec.json.decode(text, type=_Version).schema
        if version != SCHEMA:
            raise SettingsError(f"{file}: schema is {version}, this report reads schema {SCHEMA}")
        result = msgspec.json.decode(text, type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{file}: not a result of `python -m loadtest run`: {error}") from None
    _check_lengths(file, result)
    return result


def _check_lengths(file: Path, result: Result) -> None:
    requests, timeline = _columns(result.requests), _columns(result.timeline)
    requests |= {f"stages.{name}": column for name, column in result.requests.stages.items()}
    tables = {"requests": requests, "timeline": timeline}
    if result.tries is not None:
        tables["tries"] = _columns(result.tries)
    tables["levels"] = {"t_s": result.levels.t_s} | {f"series.{n}": c for n, c in result.levels.series.items()}
    for table, columns in tables.items():
        first, rows = next((name, len(column)) for name, column in columns.items())
        for name, column in columns.items():
            if len(column) != rows:
                raise SettingsError(f"{file}: {table}.{name} has {len(column)} entries, {table}.{first} has {rows}")
        times_s = columns.get("t_s", [])
        if any(later <= earlier for earlier, later in itertools.pairwise(times_s)):
            raise SettingsError(f"{file}: {table}.t_s does not ascend")
    if result.timeline.bucket_s <= 0:
        raise SettingsError(f"{file}: timeline.bucket_s is {result.timeline.bucket_s:g}, it must be above 0")


def _columns(table: msgspec.Struct) -> dict[str, list[Any]]:
    return {name: column for name, column in msgspec.structs.asdict(table).items() if isinstance(column, list)}


def _labels(files: list[Path], results: list[Result]) -> list[str]:
    """Folder names tell runs apart in a chart's legend; a number does where they are alike."""
    names = []
    for file, result in zip(files, results, strict=True):
        folder = file.resolve().parent.name
        names.append((folder if file.name == FILE else file.stem) or result.name)
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]

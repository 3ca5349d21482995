"""`python -m loadtest report RUN...`: one HTML page about a run, or a comparison of several."""

import argparse
import sys
from pathlib import Path

from loadtest.report import comparison, page, runs, single
from shared.errors import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with a result.json, or the file")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="default: report.html beside the one run, else ./comparison.html"
    )


def run(args: argparse.Namespace) -> int:
    try:
        path = write(args.runs, args.out)
    except SettingsError as error:
        print(f"loadtest report: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e3:,.0f} kB)")
    return 0


def write(paths: list[Path], out: Path | None = None) -> Path:
    """Writes the page and says where. Raises SettingsError."""
    read = runs.read_runs(paths)
    told = single.page(read[0]) if len(read) == 1 else comparison.page(read)
    path = out or (read[0].path.with_name("report.html") if len(read) == 1 else Path("comparison.html"))
    text = page.render(told)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written: {error.strerror}; choose another --out") from None
    return path

"""Renders a page to one file that opens from disk: styles, scripts and data inside, nothing loaded from elsewhere.

Invariants: whatever a run holds is text to the page, never markup: the template escapes, and the data cannot close its
script element.
"""

import base64
import hashlib
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup

from loadtest.report.blocks import Chart, Page

FOLDER = Path(__file__).parent
STYLES = ("vendor/uPlot.min.css", "assets/page.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "assets/charts.js")


def render(page: Page) -> str:
    charts = [block for section in page.sections for block in section.blocks if isinstance(block, Chart)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_read(name) for name in SCRIPTS]
    return environment.get_template("page.html.j2").render(
        page=page,
        numbers={id(chart): number for number, chart in enumerate(charts)},
        identify=id,
        data=embedded(charts),
        styles=[Markup(_read(name)) for name in STYLES],  # noqa: S704 files of this package
        scripts=[Markup(script) for script in scripts],  # noqa: S704 files of this package
        script_hashes=[_digest(script) for script in scripts],
    )


def embedded(charts: list[Chart]) -> Markup:
    """JSON that may stand in a script element: no `<` can end it or open a comment."""
    text = msgspec.json.encode(charts).decode().replace("<", "\\u003c")
    return Markup(text)  # noqa: S704 no markup is left in it


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").strip()


def _digest(script: str) -> str:
    """For the content security policy: only these scripts run, whatever else should get into the page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

"""The page's colours, light and dark: text and marks can be told from what they stand on (WCAG 2.2 AA)."""

import re
from importlib import resources

import pytest

CSS = resources.files("services.gateway.observe.dashboard").joinpath("assets/page.css").read_text()
TEXT, MARK = 4.5, 3.0
PAIRS = [
    (front, back, TEXT) for front in ("ink", "quiet", "accent", "good", "warn", "bad") for back in ("panel", "ground")
] + [
    ("accent-ink", "accent", TEXT),
    ("accent", "soft", TEXT),
    ("ink", "soft", TEXT),
    ("quiet", "soft", TEXT),
    ("ink", "bad-soft", TEXT),
    ("bad", "bad-soft", TEXT),
    ("ink", "warn-soft", TEXT),
    ("accent", "track", MARK),
    ("quiet", "track", MARK),
    ("warn", "track", MARK),
]


def palette(scheme: str) -> dict[str, str]:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    )
    return light if scheme == "light" else light | dark


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_right():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("front", "back", "least"), PAIRS)
def test_everything_can_be_read(scheme, front, back, least):
    colours = palette(scheme)
    assert contrast(colours[front], colours[back]) >= least

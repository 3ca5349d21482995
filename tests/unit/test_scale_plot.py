"""The picture of throughput against workers."""

from xml.etree import ElementTree as ET

import pytest

from loadtest.report.scale_plot import plot

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("points", [[(1, 100.0), (2, 199.0), (4, 300.0)], [(2, 50.0)], [(1, 0.0), (2, 0.0)]])
def test_every_point_is_drawn_and_labelled(points: list[tuple[int, float]]) -> None:
    root = ET.fromstring(plot(points, of="decode workers", unit="tokens/s <i>"))  # noqa: S314 - our own
    assert len(root.findall(f"{SVG}circle")) == len(points)
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert "tokens/s <i>" in texts
    for workers, _ in points:
        assert str(workers) in texts


def test_the_share_is_of_the_straight_line() -> None:
    text = plot([(1, 100.0), (4, 300.0)], of="x", unit="y")
    assert "300 (75%)" in text
    assert "100 (100%)" in text

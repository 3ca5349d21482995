"""Throughput against workers as a picture: what was measured, and the straight line of the first point. Pure."""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 340, 80, 46, 22, 20
FONT = 'font-family="sans-serif" font-size="12"'


def plot(points: Sequence[tuple[int, float]], *, of: str, unit: str) -> str:
    """`points`: (workers, throughput), the first with the fewest workers. An SVG that stands by itself."""
    first, most = points[0], max(workers for workers, _ in points)
    slope = first[1] / first[0]
    top = max(most * slope, *(value for _, value in points)) * 1.05 or 1.0

    def x(workers: float) -> float:
        return LEFT + workers / most * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#444"/>',
        f'<path d="M{x(0):.1f} {y(0):.1f}L{x(most):.1f} {y(most * slope):.1f}" stroke="#999" stroke-dasharray="5 4"/>',
    ]
    line = " ".join(f"{x(workers):.1f},{y(value):.1f}" for workers, value in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1b6ca8" stroke-width="2"/>')
    for workers, value in points:
        label = f"{value:,.0f} ({value / (workers * slope) if slope else 0:.0%})"
        parts += [
            f'<circle cx="{x(workers):.1f}" cy="{y(value):.1f}" r="4" fill="#1b6ca8"/>',
            f'<text x="{x(workers) - 8:.1f}" y="{y(value) - 9:.1f}" text-anchor="end">{label}</text>',
            f'<text x="{x(workers):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{workers}</text>',
        ]
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts += [
        f'<text x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(of)}</text>',
        f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"

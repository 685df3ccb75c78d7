# Copyright (c) 2026, the megatron-core gptoss authors.
"""Line charts as SVG text without a plotting package, for self-contained HTML reports."""

import math
from html import escape
from typing import Sequence

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 12, 30
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
MAX_POINTS = 1000
# For larger values the difference of two values overflows.
MAX_VALUE = 1e300

Points = Sequence[tuple[float, float]]


def line_chart(series: dict[str, Points], label: str) -> str:
    """An <svg> element with curves over the step.

    Args:
        series: points (step, value) by name; non-finite values are omitted.
        label: description of the values.
    Returns:
        The element, or '' if there is no point.
    """
    series = {
        name: [(x, y) for x, y in points if abs(y) <= MAX_VALUE] for name, points in series.items()
    }
    series = {name: _downsample(points) for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_high = _axis_range(min(xs), max(xs))
    y_low, y_high = _axis_range(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in _ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:g}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        else:
            parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        y = TOP + 14 * (index + 1)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{y}" style="fill:{colour}">{escape(name)}</text>'
        )
    return "\n".join(parts + ["</svg>"])


def _downsample(points: Points) -> Points:
    """At most `MAX_POINTS` points, including the last one."""
    stride = -(-len(points) // MAX_POINTS)
    return [point for i, point in enumerate(points) if i % stride == 0 or i == len(points) - 1]


def _axis_range(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low)
    if margin <= 1e-12 * max(abs(low), abs(high)):  # below the precision of tick labels
        margin = 0.1 * max(abs(low), abs(high))
    margin = margin if margin > 1e-300 else 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    while (high - low) / step > 8:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = math.ceil(low / step)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step) + 1)]

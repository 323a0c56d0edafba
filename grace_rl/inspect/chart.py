"""Line charts as SVG: sharp at any size, readable without a script, in the page and in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grace_rl.inspect.markup import plain

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 10, 24
POINTS = 240  # more than these are thinned, extremes kept
COLOURS = 8  # .c0 to .c7 in look.css


@dataclass(frozen=True)
class Line:
    """One curve: its name, x and y; a NaN breaks it. Dashed curves are those of a second run."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    healthy: tuple[float | None, float | None] = (None, None),
    alarms: Sequence[float] = (),
    x_name: str = "step",
) -> str:
    """An SVG with axes, the healthy range shaded and a mark at each alarm.

    Args:
        title: Read out by screen readers.
        lines: The curves.
        healthy: Lowest and highest healthy value; None is no limit.
        alarms: Where alarms fired, on the x axis.
        x_name: What x is.
    """
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    places = [x for line in lines for x in line.x]
    if not values:
        return '<p class="quiet">no values yet</p>'
    limits = [end for end in healthy if end is not None]
    low, high = _span(values, limits)
    first, last = min(places), max(places)

    def x_at(x: float) -> float:
        share = 0.5 if last == first else (x - first) / (last - first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        )

    parts = []
    if limits:
        bottom = low if healthy[0] is None else healthy[0]
        top = high if healthy[1] is None else healthy[1]
        parts.append(
            f'<rect class="healthy" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" '
            f'y="{y_at(top):.1f}" height="{max(0.0, y_at(bottom) - y_at(top)):.1f}">'
            f"<title>healthy</title></rect>"
        )
    for tick in _ticks(low, high):
        y = y_at(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>')
    for place, anchor in ((first, "start"), (last, "end")):
        label = f"{x_name} {place:g}" if place == first else f"{place:g}"
        parts.append(
            f'<text x="{x_at(place):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{label}</text>'
        )
    for place in alarms:
        x = x_at(place)
        parts.append(
            f'<line class="alarm" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>alarm at {x_name} {place:g}</title></line>"
        )
    for line in lines:
        parts.append(_curve(line, x_at, y_at, x_name))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{plain(title)}">{"".join(parts)}</svg>'
    )


def legend(lines: Sequence[Line]) -> str:
    """The names of the curves, for more than one."""
    if len(lines) < 2:
        return ""
    items = []
    for line in lines:
        swatch = f"swatch c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"
        items.append(f'<li><span class="{swatch}"></span>{plain(line.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _curve(
    line: Line, x_at: Callable[[float], float], y_at: Callable[[float], float], x_name: str
) -> str:
    points = _thinned([(x, y) for x, y in zip(line.x, line.y, strict=True)])
    path, pen = [], "M"
    dots = []
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{x_at(x):.1f} {y_at(y):.1f}")
        dots.append(
            f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="6">'
            f"<title>{plain(line.name)}, {x_name} {x:g}: {y:.4g}</title></circle>"
        )
        pen = "L"
    lone = (
        "".join(dot.replace('r="6"', 'r="2.5" class="dot"') for dot in dots)
        if len(dots) == 1
        else ""
    )
    dashed = " dashed" if line.dashed else ""
    return (
        f'<g class="c{line.colour % COLOURS}{dashed}"><path d="{" ".join(path)}"/>{lone}'
        f'<g class="points">{"".join(dots)}</g></g>'
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `POINTS`, the lowest and highest of each run of neighbours among them."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(len(points) / (POINTS / 2))
    kept = []
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if math.isfinite(point[1])]
        if part:
            ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
            kept += sorted(ends)
    return kept


def _span(values: Sequence[float], limits: Sequence[float]) -> tuple[float, float]:
    """The y axis: all values, and limits that are not far away."""
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    for limit in limits:
        if low - 2 * reach <= limit <= high + 2 * reach:
            low, high = min(low, limit), max(high, limit)
    margin = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers inside.

    >>> _ticks(0.0, 1.0)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]

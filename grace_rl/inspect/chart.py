"""Line charts as SVG: sharp at any size, readable without a script, in the page and in a file.

Here are the places of things; `templates/parts.html.jinja` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 10, 24
POINTS = 240  # more than these are thinned, extremes kept
LARGEST = 1e100  # what is beyond it is drawn like NaN
LOOKS = 8  # colours .c0 to .c7 and dashes .d0 to .d7 in look.css


@dataclass(frozen=True)
class Line:
    """One curve: its name, x and y; a NaN breaks it. Colour tells metrics apart, dashes runs."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0

    @property
    def look(self) -> str:
        return f"c{self.colour % LOOKS} d{self.dash % LOOKS}"


@dataclass(frozen=True)
class Curve:
    """A line as it is drawn: `path` of SVG, and (x, y, words) of each point."""

    line: Line
    path: str
    points: list[tuple[float, float, str]]


@dataclass
class Chart:
    """A chart of some lines.

    Args:
        title: What it shows.
        lines: The curves.
        healthy: Lowest and highest healthy value; None is no limit.
        alarms: Where alarms fired, on the x axis.
        x_name: What x is.
        note: A line below, such as the healthy range in words.

    Attributes:
        box: x, y, width and height of the plot.
        ticks: y and label of each.
        ends: x, label and anchor of the first and last x.
        band: y and height of the healthy range; None without one.
        marks: x and label of each alarm.
        curves: The lines as they are drawn; none where there are no values.
    """

    title: str
    lines: Sequence[Line]
    healthy: tuple[float | None, float | None] = (None, None)
    alarms: Sequence[float] = ()
    x_name: str = "step"
    note: str = ""
    box: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    size: tuple[int, int] = (WIDTH, HEIGHT)
    ticks: list[tuple[float, float]] = field(default_factory=list)
    ends: list[tuple[float, str, str]] = field(default_factory=list)
    band: tuple[float, float] | None = None
    marks: list[tuple[float, str]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = [y for line in self.lines for y in line.y if abs(y) < LARGEST]
        if not values:
            return
        limits = [end for end in self.healthy if end is not None]
        self._low, self._high = _span(values, limits)
        places = [x for line in self.lines for x in line.x]
        self._first, self._last = min(places), max(places)
        self.ticks = [(self._y(tick), tick) for tick in _ticks(self._low, self._high)]
        self.ends = [
            (self._x(self._first), f"{self.x_name} {self._first:g}", "start"),
            (self._x(self._last), f"{self._last:g}", "end"),
        ]
        if limits:
            low, high = self.healthy
            top = self._y(self._high if high is None else high)
            self.band = (top, max(0.0, self._y(self._low if low is None else low) - top))
        self.marks = [(self._x(x), f"alarm at {self.x_name} {x:g}") for x in self.alarms]
        self.curves = list(map(self._curve, self.lines))

    def _x(self, x: float) -> float:
        wide = self._last - self._first
        return round(LEFT + (0.5 if not wide else (x - self._first) / wide) * self.box[2], 1)

    def _y(self, y: float) -> float:
        share = (min(max(y, self._low), self._high) - self._low) / (self._high - self._low)
        return round(HEIGHT - BOTTOM - share * self.box[3], 1)

    def _curve(self, line: Line) -> Curve:
        path, points, pen = [], [], "M"
        for x, y in _thinned(list(zip(line.x, line.y, strict=True))):
            if not abs(y) < LARGEST:
                pen = "M"
                continue
            place = self._x(x), self._y(y)
            path.append(f"{pen}{place[0]} {place[1]}")
            points.append((*place, f"{line.name}, {self.x_name} {x:g}: {y:.4g}"))
            pen = "L"
        return Curve(line, " ".join(path), points)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `POINTS`, the lowest and highest of each run of neighbours among them."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(len(points) / (POINTS / 2))
    kept = []
    for start in range(0, len(points), size):
        part = [point for point in points[start : start + size] if abs(point[1]) < LARGEST]
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
    margin = max(margin, 1e-300)
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

"""Curves as SVG, drawn without a script. Colours are classes of the page, so that they follow dark and light."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 720, 240  # units of the drawing, which scales with the page
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 26
MOST_POINTS = 600  # of a line: more than a screen shows
SPIKES = 0.01  # share of the points that may lie outside, at each end: one spike must not flatten the curve
WINDOW = 0.05  # share of the steps over which the smoothed loss looks back

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve, or single dots."""

    name: str  # in the legend
    style: str  # class of the page: raw, smooth, held or plain
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One drawing. `marks`: steps with a line of their own (saves)."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[int] = field(default=())
    logarithmic: bool = False

    def svg(self) -> str:
        """The drawing as an element of HTML; "" where there is nothing to draw."""
        points = [point for line in self.lines for point in line.points if self._is_drawable(point)]
        if len(points) < 2:
            return ""
        first, last = min(x for x, _ in points), max(x for x, _ in points)
        low, high = _range([self._scaled(y) for _, y in points])
        frame = _Frame(first, max(last, first + 1), low, high)
        parts = [*self._grid(frame), *self._marks(frame)]
        for line in self.lines:
            kept = [(x, self._scaled(y)) for x, y in line.points if self._is_drawable((x, y))]
            parts.append(_dots(kept, line, frame) if line.dots else _curve(_thinned(kept), line, frame))
        label = html.escape(f"{self.title}, step {first:g} to {last:g}")
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
            f"{''.join(parts)}</svg>"
        )

    def _is_drawable(self, point: Point) -> bool:
        return math.isfinite(point[1]) and (not self.logarithmic or point[1] > 0)

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.logarithmic else y

    def _grid(self, frame: _Frame) -> list[str]:
        parts = []
        for value in _ticks(frame.low, frame.high, 4):
            y = frame.y(value)
            text = f"{10**value:.3g}" if self.logarithmic else f"{value:.4g}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for value in _ticks(frame.first, frame.last, 6):
            place = f'x="{frame.x(value):.1f}" y="{HEIGHT - 6}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{value:,.0f}</text>')
        return parts

    def _marks(self, frame: _Frame) -> list[str]:
        parts = []
        for step in self.marks:
            if frame.first <= step <= frame.last:
                x = frame.x(step)
                parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        return parts


@dataclass(frozen=True)
class _Frame:
    """Where numbers are on the drawing."""

    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """What lies outside is drawn at the edge."""
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over about `WINDOW` of the points, without the bias of its beginning."""
    keep = 1 - 1 / max(2.0, WINDOW * len(points))
    mean = weight = 0.0
    found = []
    for x, y in points:
        mean = keep * mean + (1 - keep) * y
        weight = keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def _range(values: list[float]) -> tuple[float, float]:
    """The numbers at the bottom and the top, with a little room."""
    ordered = sorted(values)
    cut = int(len(ordered) * SPIKES)
    low, high = ordered[cut], ordered[-1 - cut]
    room = (high - low) * 0.06
    if room < 1e-12:  # a constant
        room = abs(high) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two others."""
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step)
    value = math.ceil(low / step) * step
    found = []
    while value <= high + step * 1e-9:
        found.append(0.0 if abs(value) < step * 1e-9 else value)
        value += step
    return found


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Fewer points: of each part of the curve the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    width = math.ceil(len(points) / (MOST_POINTS // 2))
    found: list[Point] = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return found


def _curve(points: Sequence[Point], line: Line, frame: _Frame) -> str:
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{line.style}" points="{places}"/>'


def _dots(points: Sequence[Point], line: Line, frame: _Frame) -> str:
    dots = [f'<circle class="{line.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"/>' for x, y in points]
    return _curve(points, line, frame) + "".join(dots)

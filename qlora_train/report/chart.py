"""Charts of lines or of stacked areas as SVG, which a browser shows without scripts.

A chart maps x in [x0, x1] and y in [y0, y1] linearly onto its frame; the four numbers are attributes of the
`svg` element, so whoever reads the file can read every value back from the points of its lines and areas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from qlora_train.units import ceil_div

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 40
MOST_POINTS = 1000
_NUM_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line. points: (x, y), ascending in x; y that is not finite is a gap. is_faint: drawn thin, behind the
    others. color: its number among the page's colors."""

    name: str
    points: Sequence[Point]
    color: int = 0
    is_faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of some series. y_from_zero: the axis begins at 0. is_stacked: areas on top of each other, of
    series that have all x in common and no gaps. note: a line of text to stand below."""

    title: str
    x_label: str
    series: Sequence[Series]
    y_from_zero: bool = False
    is_stacked: bool = False
    note: str = ""

    @property
    def is_empty(self) -> bool:
        return not any(len(_finite(series.points)) for series in self.series)

    def svg(self) -> str:
        """The chart as an `svg` element."""
        drawn = _stacked(self.series) if self.is_stacked else self.series
        points = [point for series in drawn for point in _finite(series.points)]
        x0, x1 = _range([x for x, _ in points], pad=0.0)
        y0, y1 = _range([y for _, y in points], pad=0.05)
        frame = _Frame(x0, x1, 0.0 if self.y_from_zero else y0, y1)
        draw = frame.area if self.is_stacked else frame.lines
        ordered = sorted(drawn, key=lambda series: not series.is_faint)
        label = escape(f"{self.title}, by {self.x_label}", quote=True)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" {frame.attributes()}>',
            *frame.grid(),
            f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" '
            f'text-anchor="middle">{escape(self.x_label)}</text>',
            *(shape for series in ordered for shape in draw(series)),
            "</svg>",
        ]
        return "\n".join(parts)


@dataclass(frozen=True)
class _Frame:
    """The values at the edges of a chart's frame."""

    x0: float
    x1: float
    y0: float
    y1: float

    def attributes(self) -> str:
        names = ("x0", "x1", "y0", "y1")
        return " ".join(f'data-{name}="{getattr(self, name)!r}"' for name in names)

    def place(self, x: float, y: float) -> Point:
        """Where a point is drawn."""
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        """Lines and numbers of both axes."""
        parts = []
        for value in _ticks(self.y0, self.y1):
            _, y = self.place(self.x0, value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>')
            parts.append(
                f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.2f}" text-anchor="end">{value:.4g}</text>'
            )
        for value in _ticks(self.x0, self.x1):
            x, _ = self.place(value, self.y0)
            below = HEIGHT - BOTTOM + 16
            parts.append(f'<text class="axis" x="{x:.2f}" y="{below}" text-anchor="middle">{value:g}</text>')
        return parts

    def lines(self, series: Series) -> list[str]:
        """The line of a series, one for each part between gaps; a single point is a dot."""
        name = escape(series.name, quote=True)
        kind = f"c{series.color}" + (" faint" if series.is_faint else "")
        drawn = []
        for part in _parts(_thinned(series.points)):
            places = [self.place(*point) for point in part]
            if len(places) == 1:
                ((x, y),) = places
                drawn.append(f'<circle class="{kind}" data-name="{name}" cx="{x:.3f}" cy="{y:.3f}" r="3"/>')
                continue
            text = " ".join(f"{x:.3f},{y:.3f}" for x, y in places)
            drawn.append(f'<polyline class="{kind}" data-name="{name}" points="{text}"/>')
        return drawn

    def area(self, series: Series) -> list[str]:
        """One of `_stacked`: its points are the outline."""
        text = " ".join(f"{x:.3f},{y:.3f}" for x, y in (self.place(*point) for point in series.points))
        name = escape(series.name, quote=True)
        return [f'<polygon class="c{series.color}" data-name="{name}" points="{text}"/>']


def _stacked(stack: Sequence[Series]) -> list[Series]:
    """The outlines of areas on top of each other: the upper edge, and the lower edge backwards."""
    outlines, edge = [], [(x, 0.0) for x, _ in _thinned(stack[0].points)]
    for series in stack:
        upper = [(x, y + under) for (x, y), (_, under) in zip(_thinned(series.points), edge, strict=True)]
        outlines.append(replace(series, points=[*upper, *reversed(edge)]))
        edge = upper
    return outlines


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    """The least and the largest value, a share of their distance beyond, never one and the same."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        return low - max(abs(low) * 0.05, 0.5), high + max(abs(high) * 0.05, 0.5)
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / _NUM_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    size = ceil_div(len(points), MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _parts(points: Sequence[Point]) -> list[list[Point]]:
    """The points between gaps."""
    parts: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """The exponential moving average over about `span` points, corrected for its start; gaps are left out."""
    keep, weight, mean = 1 - 2 / (span + 1), 0.0, 0.0
    averaged = []
    for x, y in _finite(points):
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        averaged.append((x, mean / weight))
    return averaged

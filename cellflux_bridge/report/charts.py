"""Curves over the level: what a chart holds, and where its parts stand in an SVG (`template/chart.html` draws it).

Colours come from the page's style sheet, so they follow light, dark and print. Series differ by colour, dash and marker
at once. A chart carries its own scale in data attributes, by which the page's script draws the curves of a single
sequence into it and moves the cursor.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from cellflux_bridge.metrics.words import number

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 12, 194
NUM_SLOTS = 6
# Kinds of baselines that evaluate makes, each with dashes of its own.
NUM_BASELINES = 3
# Real patches that are no band but have levels.
REAL = "r0"
# Markers of the methods, drawn around (0, 0), and the one of all other series.
MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-3.5L3.3 2.6H-3.3z",
    "M0-3.8L3.8 0 0 3.8-3.8 0z",
    "M0 3.5L3.3-2.6H-3.3z",
    "M-3-1H-1V-3H1V-1H3V1H1V3H-1V1H-3z",
)
OTHER_MARK = "M-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0z"


class Point(NamedTuple):
    """A value at a level with its interval, `low` and `high` None where there is none, and the number it rests on."""

    level: float
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Series(NamedTuple):
    """`style` is m0..m5 of a method, b0..b2 of a baseline, r0 of real patches; methods beyond the sixth share styles,
    so the page's script tells series apart by `name`, which no two of a chart share."""

    name: str
    style: str
    points: tuple[Point, ...]


class Band(NamedTuple):
    """What real patches reach, drawn across the chart."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


class Chart(NamedTuple):
    """`key` names the curves of a single sequence that belong into it; `diagonal` is the level itself. `axis` is what
    runs from 0 to 1 below it, and stands in `Point.level`."""

    key: str
    title: str
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    diagonal: bool = False
    extra: tuple[float, ...] = ()
    axis: str = "level"


def style_of(slot: int) -> str:
    return f"m{slot % NUM_SLOTS}"


def baseline_style(kind: int) -> str:
    return f"b{kind % NUM_BASELINES}"


def mark(style: str) -> str:
    """The path of a style's marker, around (0, 0)."""
    return MARKS[int(style[1:])] if style.startswith("m") else OTHER_MARK


def _finite(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


class Plot(NamedTuple):
    """A chart on its vertical axis from `low` to `high`; `leaves` where a baseline leaves the picture."""

    chart: Chart
    low: float
    high: float
    ticks: list[float]
    leaves: bool

    def x(self, level: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * level, 1)

    def y(self, value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low), 1)

    def places(self, series: Series) -> list[tuple[float, float]]:
        return [(self.x(p.level), self.y(p.value)) for p in series.points]

    def interval(self, series: Series) -> str:
        """The path around a series' intervals; empty where fewer than two points have one."""
        found = [p for p in series.points if p.low is not None and p.high is not None]
        corners = [(p.level, p.high) for p in found] + [(p.level, p.low) for p in reversed(found)]
        return "M" + "L".join(f"{self.x(a)} {self.y(b)}" for a, b in corners) + "z" if len(found) > 1 else ""

    def band(self, band: Band) -> tuple[float, float, float]:
        """Top, height and line of a band."""
        low, high = (band.value if v is None else v for v in (band.low, band.high))
        top = self.y(high)
        return top, max(0.0, round(self.y(low) - top, 1)), self.y(band.value)

    def band_names(self) -> list[tuple[str, float, float]]:
        """What stands at the bands' lines, at which value, and where: below its line if it would leave the picture.
        Names that would overlap stand as one."""
        found: list[tuple[str, float, float]] = []
        for band in sorted(self.chart.bands, key=lambda band: -band.value):
            line = self.y(band.value)
            at = line + (11 if line < TOP + 12 else -4)
            if found and at - found[-1][2] < 11:
                name, *place = found.pop()
                found.append((f"{name}, {band.name}", *place))
            else:
                found.append((band.name, band.value, at))
        return found

    def in_words(self) -> str:
        """The curves in words, for those who cannot see them."""
        ends = [(s.name, number(s.points[0].value), number(s.points[-1].value)) for s in self.chart.series]
        return f"{self.chart.title} over the {self.chart.axis}: " + "; ".join(
            f"{name} from {a} to {b}" for name, a, b in ends
        )


def plot(chart: Chart) -> Plot:
    """Methods, real patches and single sequences rule the scale: a baseline far away would flatten what is compared."""
    kept = [p for s in chart.series if s.style.startswith("m") for p in s.points]
    values = _finite([v for p in (*kept, *chart.bands) for v in (p.value, p.low, p.high)] + list(chart.extra))
    values += [0.0, 1.0] if chart.diagonal else []
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 < low < 0.4 * high:
        low = 0.0
    room = 0.04 * (high - low) or 0.5
    low, high = low - (room if low != 0 else 0), high + room
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    shown = [0.0 if abs(t) < 1e-12 else float(t) for t in ticks if low - 1e-9 <= t <= high + 1e-9]
    others = _finite([p.value for s in chart.series if not s.style.startswith("m") for p in s.points])
    return Plot(chart, low, high, shown, any(not low <= value <= high for value in others))

"""Curves over the level as inline SVG: colours come from the page's style sheet, so they follow light, dark and print.

Series differ by colour, dash and marker at once. A chart carries its own scale in data attributes, by which the page's
script draws the curves of a single sequence into it and moves the cursor.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from cellflux_bridge.metrics.words import number

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 12, 194
NUM_SLOTS = 6
# Kinds of baselines that evaluate makes, each with dashes of its own.
NUM_BASELINES = 3
# Real patches that are no band but have levels.
REAL = "r0"
# Drawn around (0, 0).
MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-3.5L3.3 2.6H-3.3z",
    "M0-3.8L3.8 0 0 3.8-3.8 0z",
    "M0 3.5L3.3-2.6H-3.3z",
    "M-3-1H-1V-3H1V-1H3V1H1V3H-1V1H-3z",
)


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
    """`key` names the curves of a single sequence that belong into it; `diagonal` is the level itself."""

    key: str
    title: str
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    diagonal: bool = False
    extra: tuple[float, ...] = ()


def style_of(slot: int) -> str:
    return f"m{slot % NUM_SLOTS}"


def baseline_style(kind: int) -> str:
    return f"b{kind % NUM_BASELINES}"


def mark(style: str) -> Markup:
    """The marker of a style, around (0, 0)."""
    if style.startswith("m"):
        return Markup('<path class="mark {}" d="{}"/>').format(style, MARKS[int(style[1:])])
    return Markup('<path class="mark {}" d="{}"/>').format(style, "M-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0z")


def swatch(style: str) -> Markup:
    """A short stroke with its marker, for a legend."""
    inner = Markup('<path class="line {}" d="M1 6H27"/><g transform="translate(14 6)">{}</g>').format(
        style, mark(style)
    )
    return Markup('<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{}</svg>').format(inner)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


class Scale(NamedTuple):
    """The ends of the vertical axis, its ticks, and whether a baseline leaves the picture."""

    low: float
    high: float
    ticks: list[float]
    leaves: bool


def scale_of(chart: Chart) -> Scale:
    """Methods, real patches and single sequences rule the scale: a baseline far away would flatten what is compared."""
    kept = [p for s in chart.series if s.style.startswith("m") for p in s.points]
    values = _finite([v for p in kept for v in (p.value, p.low, p.high)] + list(chart.extra))
    values += _finite([v for band in chart.bands for v in (band.value, band.low, band.high)])
    values += [0.0, 1.0] if chart.diagonal else []
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 < low < 0.4 * high:
        low = 0.0
    room = 0.04 * (high - low) or 0.5
    low, high = low - (room if low != 0 else 0), high + room
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    others = _finite([p.value for s in chart.series if not s.style.startswith("m") for p in s.points])
    leaves = any(not low <= value <= high for value in others)
    return Scale(low, high, [float(t) for t in ticks if low - 1e-9 <= t <= high + 1e-9], leaves)


def draw(chart: Chart, *, interactive: bool = False) -> Markup:
    """The chart; an `interactive` one leaves room for the curves of single sequences before its own."""
    scale = scale_of(chart)

    def x(level: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * level, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - scale.low) / (scale.high - scale.low), 1)

    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick" x="{}" y="{}">{}</text>').format(
            LEFT, RIGHT, y(t), y(t), LEFT - 6, y(t) + 3.5, number(0.0 if abs(t) < 1e-12 else t)
        )
        for t in scale.ticks
    ]
    parts += [
        Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(x(level), BOTTOM + 15, f"{level:g}")
        for level in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(Markup('<text class="axis" x="{}" y="{}">level</text>').format((LEFT + RIGHT) / 2, BOTTOM + 31))
    bands = [_band(band, y) for band in chart.bands]
    inside = [shape for shape, _ in bands]
    if chart.diagonal:
        inside.append(Markup('<path class="diagonal" d="M{} {}L{} {}"/>').format(x(0), y(0), x(1), y(1)))
    faint = " faint" if interactive else ""
    inside += [_interval(series, x, y, faint) for series in chart.series]
    inside += [_line(series, x, y, faint) for series in chart.series]
    inside += [name for _, name in bands]  # above the curves, or they could not be read
    name = "clip-" + "".join(c if c.isalnum() else "-" for c in chart.key)
    parts.append(
        Markup('<clipPath id="{}"><rect x="{}" y="{}" width="{}" height="{}"/></clipPath>').format(
            name, LEFT - 4, TOP - 5, RIGHT - LEFT + 8, BOTTOM - TOP + 10
        )
    )
    parts.append(Markup('<g clip-path="url(#{})">{}</g>').format(name, Markup("").join(inside)))
    parts.append(Markup('<line class="cursor" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(LEFT, TOP, BOTTOM))
    parts.append(Markup('<g class="own"></g><g class="now"></g>'))
    note = Markup(" <small>A baseline leaves the picture.</small>") if scale.leaves else ""
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-key="{}" data-x0="{}" data-x1="{}" '
        'data-y0="{}" data-y1="{}" data-v0="{}" data-v1="{}">{}</svg>'
    ).format(
        *(WIDTH, HEIGHT, _spoken(chart), chart.key, LEFT, RIGHT, BOTTOM, TOP, scale.low, scale.high),
        Markup("").join(parts),
    )
    caption = Markup("<figcaption><b>{}</b>{}</figcaption>").format(chart.title, note)
    return Markup('<figure class="plot">{}{}</figure>').format(caption, svg)


def _spoken(chart: Chart) -> str:
    """The curves in words, for those who cannot see them."""
    ends = [f"{s.name} from {number(s.points[0].value)} to {number(s.points[-1].value)}" for s in chart.series]
    return f"{chart.title} over the level: " + "; ".join(ends)


def _interval(series: Series, x, y, faint: str) -> Markup:
    found = [p for p in series.points if p.low is not None and p.high is not None]
    if len(found) < 2:
        return Markup("")
    upper = [f"{x(p.level)} {y(p.high)}" for p in found]
    lower = [f"{x(p.level)} {y(p.low)}" for p in reversed(found)]
    return Markup('<path class="interval {}{}" data-series="{}" d="M{}z"/>').format(
        series.style, faint, series.name, "L".join(upper + lower)
    )


def _line(series: Series, x, y, faint: str) -> Markup:
    places = [(x(p.level), y(p.value)) for p in series.points]
    points = " ".join(f"{a},{b}" for a, b in places)
    parts = [Markup('<polyline class="line {}{}" points="{}"/>').format(series.style, faint, points)]
    if not faint and series.style.startswith("m"):
        parts += [Markup('<g transform="translate({} {})">{}</g>').format(a, b, mark(series.style)) for a, b in places]
    return Markup('<g class="series" data-style="{}" data-series="{}"><title>{}</title>{}</g>').format(
        series.style, series.name, series.name, Markup("").join(parts)
    )


def _band(band: Band, y) -> tuple[Markup, Markup]:
    """The band, and its name."""
    low, high = (band.value if v is None else v for v in (band.low, band.high))
    at, top = y(band.value), y(high)
    shape = Markup(
        '<g class="band"><title>{}</title><rect x="{}" width="{}" y="{}" height="{}"/><path d="M{} {}H{}"/></g>'
    ).format(band.name, LEFT, RIGHT - LEFT, top, max(0.0, round(y(low) - top, 1)), LEFT, at, RIGHT)
    # A name that would leave the picture stands below its line.
    name_at = at + (11 if at < TOP + 12 else -4)
    return shape, Markup('<text class="band" x="{}" y="{}">{}</text>').format(RIGHT - 4, name_at, band.name)

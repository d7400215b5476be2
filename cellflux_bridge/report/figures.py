"""Figures at publication size, PNG and PDF, each with its numbers as CSV: a strip, the nuclei, and KID by level."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellflux_bridge.base.files import csv_text, replace_text, replacing
from cellflux_bridge.report import tables
from cellflux_bridge.report.charts import REAL, Chart, plot
from cellflux_bridge.report.gallery import Gallery, Shown
from cellflux_bridge.report.runs import Chapter, Method

# Okabe and Ito's palette, told apart by all; with the markers and dashes of the page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)))
# Millimetres of a page's column, and of its whole width.
_COLUMN, _PAGE, _INCH = 89, 183, 25.4
_STYLE = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 6.5,
    "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.2,
}  # fmt: skip
_ROWS = 6


def write_figures(
    chapter: Chapter, gallery: Gallery | None, real: dict[int, list[np.ndarray]], folder: Path, *, suffix: str = ""
) -> list[Path]:
    """Write what the chapter has the numbers for into `folder`; `suffix` tells chapters apart. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context(_STYLE):
        if gallery is not None:
            made += _save(folder / f"strip{suffix}", _strip(chapter, gallery, real), _strip_rows(chapter, gallery))
        plots = {"cellularity": tables.nuclei_charts(chapter), "kid": _kid_charts(chapter)}
        plots["spectrum"] = [chart for chart in (tables.spectrum(chapter),) if chart is not None]
        for name, charts in plots.items():
            if charts:
                made += _save(folder / f"{name}{suffix}", _panels(charts), _panel_rows(charts))
    return made


def _kid_charts(chapter: Chapter) -> list[Chart]:
    """To real patches of the own level first, then to both classes pooled."""
    found = [chart for _, chart in tables.curves(chapter)]
    return [chart for kind in ("kid_own:", "kid_pooled:") for chart in found if chart.key.startswith(kind)]


def _save(stem: Path, figure: Figure, rows: Sequence[Sequence]) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{form}") for form in ("png", "pdf", "csv")]
    FigureCanvasAgg(figure)
    for path in paths[:2]:
        form = path.suffix[1:]
        # Without a date the same numbers give the same file.
        metadata = {"CreationDate": None} if form == "pdf" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=form, dpi=300, metadata=metadata)
    replace_text(paths[2], csv_text(rows))
    return paths


def _panels(charts: Sequence[Chart]) -> Figure:
    columns = min(len(charts), 3)
    rows = -(-len(charts) // columns)
    size = (_COLUMN if columns == 1 else _PAGE) / _INCH, rows * 52 / _INCH + 0.35
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, chart in zip(axes[: len(charts)], charts, strict=True):
        _panel(axis, chart)
    for axis in axes[len(charts) :]:
        axis.axis("off")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label()[0] != "_"}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), 2 if columns == 1 else 5)
    )
    return figure


def _panel(axis, chart: Chart) -> None:
    for band in chart.bands:
        axis.axhline(band.value, color="#8a8a8a", linewidth=0.7)
        if band.low is not None and band.high is not None:
            axis.axhspan(band.low, band.high, color="#8a8a8a", alpha=0.25, linewidth=0)
    for name, value, _ in plot(chart).band_names():
        place = {"xy": (0.99, value), "xycoords": ("axes fraction", "data"), "fontsize": 5.5, "color": "#555555"}
        axis.annotate(name, xytext=(0, 1.5), textcoords="offset points", ha="right", **place)
    for series in (s for s in chart.series if s.style == REAL and chart.axis != "level"):
        axis.plot(*np.array(series.points, dtype=np.float64)[:, :2].T, color="#8a8a8a", label=series.name)
    for series in (s for s in chart.series if s.style.startswith("m")):
        slot, values = int(series.style[1:]), np.array(series.points, dtype=np.float64)
        style = {"color": COLOURS[slot], "marker": MARKERS[slot], "linestyle": DASHES[slot]}
        axis.plot(values[:, 0], values[:, 1], label=series.name, **style)
        axis.fill_between(values[:, 0], values[:, 2], values[:, 3], color=COLOURS[slot], alpha=0.18, linewidth=0)
    axis.set(title=chart.title.replace(" — ", "\n"), xlabel=chart.axis, xlim=(-0.02, 1.02))


def _panel_rows(charts: Sequence[Chart]) -> list[Sequence]:
    rows = [["panel", "curve", "level", "value", "low", "high", "n"]]
    for chart in charts:
        rows += [[chart.title, series.name, *point] for series in chart.series for point in series.points]
        rows += [[chart.title, band.name, None, band.value, band.low, band.high, None] for band in chart.bands]
    return rows


class _StripRow(NamedTuple):
    """One sequence of the strip: under each level of the first method, the number of its nearest frame."""

    method: Method
    shown: Shown
    levels: list[float]
    numbers: list[int]


def _strip_sequences(chapter: Chapter, gallery: Gallery) -> list[_StripRow]:
    """Methods side by side on as many sources as fit."""
    methods = [method for method in chapter.methods if method.slot in gallery.levels]
    sources = list(gallery.shown.values())
    num = max(1, _ROWS // len(methods))
    chosen = [sources[i] for i in dict.fromkeys(np.linspace(0, len(sources) - 1, num).round().astype(int).tolist())]
    rows = []
    for method, row in ((method, row) for row in chosen for method in methods if method.slot in row):
        own = gallery.levels[method.slot]
        numbers = [int(np.abs(np.array(own) - level).argmin()) for level in _head(gallery)]
        rows.append(_StripRow(method, row[method.slot], own, numbers))
    return rows


def _head(gallery: Gallery) -> list[float]:
    """The levels above the strip's columns: those of the first method."""
    return gallery.levels[min(gallery.levels)]


def _strip(chapter: Chapter, gallery: Gallery, real: dict[int, list[np.ndarray]]) -> Figure:
    """Rows of frames under the first method's levels; a frame of another level shows its own."""
    head_levels, pictures = _head(gallery), []
    for method, shown, levels, numbers in _strip_sequences(chapter, gallery):
        own = [
            "" if abs(levels[k] - s) < 0.005 else f"{levels[k]:.2g}" for k, s in zip(numbers, head_levels, strict=True)
        ]
        images = shown.frames[numbers]
        pictures.append((method.name, dict(enumerate(zip(images, own, strict=True)))))
    if real:
        pictures.append(("real", {column: (patches[0], "") for column, patches in real.items()}))
    names_width, head, step = 24, 5, (_PAGE - 24) / len(head_levels)  # millimetres
    height = head + len(pictures) * step
    figure = Figure(figsize=(_PAGE / _INCH, height / _INCH))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for row, (name, tiles) in enumerate(pictures):
        top = head + row * step
        if row == 0 or name != pictures[row - 1][0]:
            axis.text(names_width - 2, top + step / 2, name, ha="right", va="center", fontsize=6, wrap=True)
        for column, (image, own) in tiles.items():
            left, side = names_width + column * step, step - 0.8
            axis.imshow(image, interpolation="nearest", extent=(left, left + side, top + side, top), aspect="auto")
            if own:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axis.text(left + 0.6, top + 0.6, own, va="top", fontsize=4.5, bbox=box)
    for column, level in enumerate(head_levels):
        axis.text(names_width + (column + 0.5) * step - 0.4, head - 1.2, f"{level:.2g}", ha="center", fontsize=6)
    axis.set(xlim=(0, _PAGE), ylim=(height, 0))  # imshow changed them
    return figure


def _strip_rows(chapter: Chapter, gallery: Gallery) -> list[Sequence]:
    sequences = _strip_sequences(chapter, gallery)
    known = list(dict.fromkeys(name for of in sequences for name in of.shown.curves))
    rows = [["row", "method", "source_id", "level", "nfe", "gradients", *known]]
    for row, (method, shown, levels, numbers) in enumerate(sequences):
        for k in numbers:
            values = [shown.curves[name][k] if name in shown.curves else None for name in known]
            rows.append([row, method.name, shown.source_id, levels[k], shown.nfe, shown.gradients, *values])
    return rows

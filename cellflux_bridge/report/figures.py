"""Figures at publication size, PNG and PDF, each with its numbers as CSV: a strip, the nuclei, and KID by level."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellflux_bridge.base.files import replace_text
from cellflux_bridge.report import tables
from cellflux_bridge.report.charts import Chart
from cellflux_bridge.report.gallery import Gallery
from cellflux_bridge.report.runs import Chapter

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
        for name, charts in (
            ("cellularity", tables.nuclei_charts(chapter)),
            ("kid", _kid_charts(chapter)),
        ):
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
        temporary, form = path.with_name(path.name + ".tmp"), path.suffix[1:]
        # Without a date the same numbers give the same file.
        metadata = {"CreationDate": None} if form == "pdf" else {}
        figure.savefig(temporary, format=form, dpi=300, metadata=metadata)
        os.replace(temporary, path)
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    replace_text(paths[2], text.getvalue())
    return paths


def _panels(charts: Sequence[Chart]) -> Figure:
    columns = min(len(charts), 3)
    rows = -(-len(charts) // columns)
    size = (_COLUMN if columns == 1 else _PAGE) / _INCH, rows * 52 / _INCH + 0.35
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, chart in zip(axes, charts, strict=False):
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
        place = {"xy": (0.99, band.value), "xycoords": ("axes fraction", "data"), "fontsize": 5.5, "color": "#555555"}
        axis.annotate(band.name, xytext=(0, 1.5), textcoords="offset points", ha="right", **place)
    for series in (s for s in chart.series if s.style.startswith("m")):
        slot, values = int(series.style[1:]), np.array(series.points, dtype=np.float64)
        style = {"color": COLOURS[slot], "marker": MARKERS[slot], "linestyle": DASHES[slot]}
        axis.plot(values[:, 0], values[:, 1], label=series.name, **style)
        axis.fill_between(values[:, 0], values[:, 2], values[:, 3], color=COLOURS[slot], alpha=0.18, linewidth=0)
    axis.set(title=chart.title.replace(" — ", "\n"), xlabel="level", xlim=(-0.02, 1.02))


def _panel_rows(charts: Sequence[Chart]) -> list[Sequence]:
    rows = [["panel", "curve", "level", "value", "low", "high", "n"]]
    for chart in charts:
        rows += [[chart.title, series.name, *point] for series in chart.series for point in series.points]
        rows += [[chart.title, band.name, None, band.value, band.low, band.high, None] for band in chart.bands]
    return rows


def _strip_places(chapter: Chapter, gallery: Gallery) -> list[tuple[str, int]]:
    """(source key, slot) of the rows: methods side by side on as many sources as fit."""
    slots = [method.slot for method in chapter.methods if method.slot in gallery.frames]
    num = max(1, _ROWS // len(slots))
    keys = list(gallery.shown)
    chosen = [keys[i] for i in dict.fromkeys(np.linspace(0, len(keys) - 1, num).round().astype(int).tolist())]
    return [(key, slot) for key in chosen for slot in slots if slot in gallery.shown[key]]


def _nearest_frames(gallery: Gallery, slot: int) -> list[int]:
    """For each level of the first method, above whose frames the levels stand, the number of the nearest frame."""
    asked, levels = gallery.levels[min(gallery.levels)], np.array(gallery.levels[slot])
    return [int(np.abs(levels - level).argmin()) for level in asked]


def _strip(chapter: Chapter, gallery: Gallery, real: dict[int, list[np.ndarray]]) -> Figure:
    """Rows of frames under the first method's levels; a frame of another level tells its own."""
    places = _strip_places(chapter, gallery)
    names = {method.slot: method.name for method in chapter.methods}
    head_levels, has_real = gallery.levels[min(gallery.levels)], bool(real)
    rows, ratio = len(places) + has_real, gallery.size[0] / gallery.size[1]
    names_width, head, step = 24, 5, (_PAGE - 24) / len(head_levels)  # millimetres
    height = head + rows * step * ratio
    figure = Figure(figsize=(_PAGE / _INCH, height / _INCH))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    pictures = []
    for key, slot in places:
        tiles = {}
        for column, k in enumerate(_nearest_frames(gallery, slot)):
            own, asked = gallery.levels[slot][k], head_levels[column]
            tiles[column] = gallery.kept[key, slot][k], "" if abs(own - asked) < 0.005 else f"{own:.2g}"
        pictures.append((names[slot], tiles))
    if has_real:
        pictures.append(("real", {column: (patches[0], "") for column, patches in real.items()}))
    for row, (name, tiles) in enumerate(pictures):
        top = head + row * step * ratio
        if row == 0 or name != pictures[row - 1][0]:
            axis.text(names_width - 2, top + step * ratio / 2, name, ha="right", va="center", fontsize=6, wrap=True)
        for column, (image, own) in tiles.items():
            left, width, tall = names_width + column * step, step - 0.8, step * ratio - 0.8
            axis.imshow(image, interpolation="nearest", extent=(left, left + width, top + tall, top), aspect="auto")
            if own:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axis.text(left + 0.6, top + 0.6, own, va="top", fontsize=4.5, bbox=box)
    for column, level in enumerate(head_levels):
        axis.text(names_width + (column + 0.5) * step - 0.4, head - 1.2, f"{level:.2g}", ha="center", fontsize=6)
    axis.set(xlim=(0, _PAGE), ylim=(height, 0))  # imshow changed them
    return figure


def _strip_rows(chapter: Chapter, gallery: Gallery) -> list[Sequence]:
    names = {method.slot: method.name for method in chapter.methods}
    places = _strip_places(chapter, gallery)
    known = list(dict.fromkeys(name for key, slot in places for name in gallery.shown[key][slot].curves))
    rows = [["row", "method", "source_id", "level", "nfe", "gradients", *known]]
    for row, (key, slot) in enumerate(places):
        shown = gallery.shown[key][slot]
        for k in _nearest_frames(gallery, slot):
            level = gallery.levels[slot][k]
            values = [shown.curves[name][k] if name in shown.curves else None for name in known]
            rows.append([row, names[slot], gallery.sources[key], level, shown.nfe, shown.gradients, *values])
    return rows

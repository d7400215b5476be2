"""The figures of a chapter as tables and curves: methods and baselines across, floors and real patches beside them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cellflux_bridge.metrics.words import NUCLEI, QUANTITIES, SECTIONS, floor_of, interval, number, words
from cellflux_bridge.report.charts import REAL, Band, Chart, Point, Series, baseline_style, style_of
from cellflux_bridge.report.reading import Figure
from cellflux_bridge.report.runs import Chapter, Method, Network


class Cell(NamedTuple):
    """A figure as text: the number, its interval, a remark ("at 0.4"), and what it rests on."""

    text: str
    interval: str = ""
    remark: str = ""
    basis: str = ""


class Row(NamedTuple):
    label: str
    reading: str
    by: str
    cells: tuple[Cell | None, ...]
    real: tuple[Cell, ...]


class Section(NamedTuple):
    title: str
    rows: tuple[Row, ...]


class LevelTable(NamedTuple):
    title: str
    levels: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def cell(figure: Figure | None, remark: str = "") -> Cell | None:
    if figure is None:
        return None
    basis = f"n = {figure.n}" + (f", against {figure.n_real} real" if figure.n_real is not None else "")
    return Cell(number(figure.value), interval(figure.low, figure.high), remark, basis)


def _unique(cells: Iterable[Cell | None]) -> tuple[Cell, ...]:
    return tuple(dict.fromkeys(found for found in cells if found is not None))


def _keys(chapter: Chapter) -> list[tuple[str, Network]]:
    """Quantities with their networks: known quantities in the order of their words, networks in that of the runs."""
    figures = ((run, figure) for run in chapter.runs for figure in run.metrics.values)
    rows = dict.fromkeys((figure.quantity, run.network(figure.extractor)) for run, figure in figures)
    order = {quantity: place for place, quantity in enumerate(QUANTITIES)}
    return sorted(rows, key=lambda row: order.get(row[0], len(order)))


def find(method: Method, quantity: str, by: Network, level: float | None) -> Figure | None:
    """A figure of a method by this very network."""
    return method.value(quantity, level, by.name) if method.run.network(by.name) == by else None


def levels_of(chapter: Chapter) -> list[float]:
    return sorted({v.level for run in chapter.runs for v in run.metrics.values if v.level is not None})


def _title(quantity: str, called: str, joint: str) -> str:
    return words(quantity).label.removesuffix(", worst") + (f"{joint}{called}" if called else "")


def _main(method: Method, quantity: str, by: Network, where: str, levels: list[float]) -> Cell | None:
    if where == "whole":
        return cell(find(method, quantity, by, None), (quantity == "seconds" and method.record.device) or "")
    if where == "end":
        return cell(find(method, quantity, by, 1.0))
    found = (find(method, quantity, by, level) for level in levels if level > 0)
    known = [figure for figure in found if figure is not None and figure.value is not None]
    worst = (min if where == "smallest" else max)(known, key=lambda figure: figure.value, default=None)
    return worst and cell(worst, f"at {worst.level:g}")


def _real(chapter: Chapter, quantity: str, by: Network) -> tuple[Cell, ...]:
    """What real patches reach, once where runs agree: the floor of a distance, else both classes' own figure."""
    floor = floor_of(quantity)
    ends = {"target": chapter.target, "source": chapter.source}
    asked = [(which, quantity, None, label) for which, label in ends.items()]
    if floor is not None:
        asked = [(*floor, 1.0, "floor at 1") if floor[0] == "own" else (*floor, None, "floor")]
    runs = [run for run in chapter.runs if run.network(by.name) == by]
    return _unique(cell(run.real(*of, by.name, at), label) for run in runs for *of, at, label in asked)


def main_table(chapter: Chapter) -> list[Section]:
    """The figures of whole sequences and of level 1, by question; a row a quantity and network."""
    columns, levels = (*chapter.methods, *chapter.baselines), levels_of(chapter)
    rows: dict[str, list[Row]] = {name: [] for name in SECTIONS}
    for quantity, by in _keys(chapter):
        meaning = words(quantity)
        for where in dict.fromkeys((meaning.where, "whole", "end")):
            cells = tuple(_main(column, quantity, by, where, levels) for column in columns)
            if any(cells):
                real = _real(chapter, quantity, by)
                rows[meaning.section].append(Row(meaning.label, meaning.reading, chapter.called(by), cells, real))
                break
    return [Section(SECTIONS[name], tuple(of)) for name, of in rows.items() if of]


def level_tables(chapter: Chapter) -> Iterator[LevelTable]:
    """Every quantity that has levels, method by method; the chapter's nuclei after them."""
    levels, columns = levels_of(chapter), (*chapter.methods, *chapter.baselines)
    for quantity, by in _keys(chapter):
        values = [(column.name, [find(column, quantity, by, level) for level in levels]) for column in columns]
        rows = [(name, dict(zip(levels, map(cell, of), strict=True))) for name, of in values if any(of)]
        if rows:
            yield _level_table(_title(quantity, chapter.called(by), ", "), rows)
    for chart in nuclei_charts(chapter):
        yield _level_table(chart.title, [(s.name, {p.level: _cell_of(p) for p in s.points}) for s in chart.series])


def _level_table(title: str, rows: Sequence[tuple[str, dict[float, Cell | None]]]) -> LevelTable:
    used = sorted({level for _, cells in rows for level, found in cells.items() if found is not None})
    return LevelTable(title, tuple(used), tuple((name, tuple(map(cells.get, used))) for name, cells in rows))


def _cell_of(point: Point) -> Cell:
    return Cell(number(point.value), interval(point.low, point.high), basis=f"n = {point.n}")


def _curves(figures: Iterable[tuple[str, str, Iterable[Figure | None]]]) -> tuple[Series, ...]:
    """The series (name, style, figures) that have any value."""
    series = (
        Series(name, style, tuple(Point(v.level, v.value, v.low, v.high, v.n) for v in of if v and v.value is not None))
        for name, style, of in figures
    )
    return tuple(one for one in series if one.points)


def baseline_styles(chapter: Chapter) -> dict[str, str]:
    """By name; baselines of one kind look alike in whatever run they were made."""
    kinds = list(dict.fromkeys(baseline.key for baseline in chapter.baselines))
    return {baseline.name: baseline_style(kinds.index(baseline.key)) for baseline in chapter.baselines}


def curves(chapter: Chapter) -> list[tuple[str, Chart]]:
    """(section, chart) of every quantity that has levels."""
    charts, levels, styles = [], levels_of(chapter), baseline_styles(chapter)
    columns = [(m, style_of(m.slot)) for m in chapter.methods] + [(b, styles[b.name]) for b in chapter.baselines]
    for quantity, by in _keys(chapter):
        floor, called = floor_of(quantity), chapter.called(by)
        run = next((run for run in chapter.runs if run.network(by.name) == by), None)
        lines = [(of.name, style, [find(of, quantity, by, level) for level in levels]) for of, style in columns]
        bands = []
        if run and floor and floor[0] == "own":  # which has levels, hence a curve
            lines.append(("real vs real", REAL, [run.real(*floor, by.name, level) for level in levels]))
        elif run and floor:
            name = "real vs real" if floor[1].endswith("_floor") else "of real patches"
            bands = [(name, run.real(*floor, by.name))]
        elif run:
            ends = {"target": chapter.target, "source": chapter.source}
            bands = [(f"real {label}", run.real(which, quantity, by.name)) for which, label in ends.items()]
        series = _curves(lines)
        if any(len(s.points) > 1 and s.style.startswith("m") for s in series):
            is_p = quantity == "probability"
            key, title = f"{'p' if is_p else quantity}:{called}", _title(quantity, called, " — ")
            charts.append((words(quantity).section, Chart(key, title, series, _bands(bands), is_p)))
    return charts


def _bands(figures: Iterable[tuple[str, Figure | None]]) -> tuple[Band, ...]:
    bands = (Band(name, v.value, v.low, v.high) for name, v in figures if v is not None and v.value is not None)
    return tuple(dict.fromkeys(bands))


def _nuclei(chapter: Chapter) -> dict[str, list[tuple[Method, list[Figure]]]]:
    """The curves of cellularity.json by quantity, with the method of each."""
    found: dict[str, list[tuple[Method, list[Figure]]]] = {}
    for method in (method for method in chapter.methods if method.cellularity):
        for quantity in dict.fromkeys(figure.quantity for figure in method.cellularity.curves):
            curve = [f for f in method.cellularity.curves if f.quantity == quantity and f.level is not None]
            found.setdefault(quantity, []).append((method, curve))
    return found


def _real_nuclei(chapter: Chapter, quantity: str) -> list[Figure]:
    return [figure for run in chapter.runs for figure in run.real_nuclei if figure.quantity == quantity]


def nuclei_charts(chapter: Chapter) -> list[Chart]:
    """The curves of cellularity.json: every quantity over the level, with what real patches of both classes have."""
    charts = []
    for quantity, entries in _nuclei(chapter).items():
        by_level = (figure for run in chapter.runs if run.cellularity for figure in run.cellularity.real_by_level)
        scored = {f.level: f for f in by_level if f.quantity == quantity and f.level is not None}
        lines = [(method.name, style_of(method.slot), curve) for method, curve in entries]
        lines.append(("real patches of the level's score", REAL, [scored[level] for level in sorted(scored)]))
        bands = _bands((f"real {real.label}", real) for real in _real_nuclei(chapter, quantity))
        if series := _curves(lines):
            charts.append(Chart(quantity, NUCLEI.get(quantity, quantity), series, bands))
    return charts


def nuclei_table(chapter: Chapter) -> list[Row]:
    """Cellularity at level 1 and its rank correlation with the level, beside real patches."""
    rows = []
    for quantity, entries in _nuclei(chapter).items():
        ends = {m.slot: cell(max(curve, key=lambda f: f.level, default=None)) for m, curve in entries}
        ranks = {m.slot: cell(s) for m, _ in entries for s in m.cellularity.spearman if s.quantity == quantity}
        real = _unique(cell(figure, figure.label) for figure in _real_nuclei(chapter, quantity))
        label, reading = NUCLEI.get(quantity, quantity), "at level 1; real target patches are the aim"
        rank_reading = "Spearman with the level, mean over sequences"
        for name, text, found, beside in (
            (label, reading, ends, real),
            (f"{label}: rank correlation", rank_reading, ranks, ()),
        ):
            rows.append(Row(name, text, "", tuple(found.get(m.slot) for m in chapter.methods), beside))
    return [row for row in rows if any(row.cells)]

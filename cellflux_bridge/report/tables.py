"""The figures of a chapter as tables and curves: methods and baselines across, floors and real patches beside them."""

from collections.abc import Iterator
from typing import NamedTuple

from cellflux_bridge.metrics.damage import DAMAGED
from cellflux_bridge.metrics.words import (
    NUCLEI,
    OPINIONS,
    QUANTITIES,
    SECTIONS,
    Words,
    floor_of,
    interval,
    number,
    words,
)
from cellflux_bridge.report.charts import REAL, Band, Chart, Point, Series, baseline_style, style_of
from cellflux_bridge.report.reading import Figure
from cellflux_bridge.report.runs import NUCLEI as OF_NUCLEI
from cellflux_bridge.report.runs import RANK, Chapter, Method, Network


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
    is_blind: bool = False  # by a network that does not see known damage


class Section(NamedTuple):
    title: str
    rows: tuple[Row, ...]


class DamageTable(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


class LevelTable(NamedTuple):
    title: str
    levels: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def cell(figure: Figure | None, remark: str = "") -> Cell | None:
    if figure is None:
        return None
    basis = f"n = {figure.n}" + (f", against {figure.n_real} real" if figure.n_real is not None else "")
    return Cell(number(figure.value), interval(figure.low, figure.high), remark, basis)


def _keys(chapter: Chapter) -> list[tuple[str, Network]]:
    """Quantities with their networks: known quantities in the order of their words, networks in that of the runs."""
    rows = {(f.quantity, run.network(f.extractor)): None for run in chapter.runs for f in run.metrics.values}
    of_nuclei = (quantity for method in chapter.methods for quantity, _ in method.nuclei)
    rows |= {(quantity, Network("", "")): None for quantity in of_nuclei}
    order = {quantity: place for place, quantity in enumerate(QUANTITIES)}
    return sorted(rows, key=lambda row: order.get(row[0], len(order)))


def words_of(quantity: str) -> Words:
    """The words of a quantity of metrics.json or, with the prefix `nuclei_`, of cellularity.json."""
    if not quantity.startswith(OF_NUCLEI):
        return words(quantity)
    kind = quantity.removeprefix(OF_NUCLEI).removesuffix(RANK)
    label, ranked = NUCLEI.get(kind, kind), "Spearman, mean over sequences"
    if quantity.endswith(RANK):
        return Words("nuclei", f"{label}: rank correlation with the level", ranked, "whole")
    return Words("nuclei", label, "at level 1; the aim is what real target patches have")


def find(method: Method, quantity: str, by: Network, level: float | None) -> Figure | None:
    """A figure of a method by this very network."""
    return method.value(quantity, level, by.name) if method.run.network(by.name) == by else None


def levels_of(chapter: Chapter) -> list[float]:
    levels = {level for run in chapter.runs for _, _, level, _ in run.lookup}
    return sorted((levels | {level for method in chapter.methods for _, level in method.nuclei}) - {None})


def _title(quantity: str, called: str, joint: str) -> str:
    return words_of(quantity).label.removesuffix(", worst") + (f"{joint}{called}" if called else "")


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
    asked = [("target", quantity, None, chapter.target), ("source", quantity, None, chapter.source)]
    if floor is not None:
        asked = [(*floor, 1.0, "floor at 1") if floor[0] == "own" else (*floor, None, "floor")]
    runs = [run for run in chapter.runs if run.network(by.name) == by]
    cells = (cell(run.real(which, of, by.name, at), label) for run in runs for which, of, at, label in asked)
    return tuple(dict.fromkeys(found for found in cells if found is not None))


def main_table(chapter: Chapter) -> list[Section]:
    """The figures of whole sequences and of level 1, by question; a row a quantity and network."""
    columns, levels = (*chapter.methods, *chapter.baselines), levels_of(chapter)
    titles = {**SECTIONS, "nuclei": "Nuclei, counted"}
    rows: dict[str, list[Row]] = {name: [] for name in titles}
    for quantity, by in _keys(chapter):
        meaning = words_of(quantity)
        for where in dict.fromkeys((meaning.where, "whole", "end")):
            cells = tuple(_main(column, quantity, by, where, levels) for column in columns)
            if any(cells):
                real = _real(chapter, quantity, by)
                runs = [run for run in chapter.runs if by.name and run.network(by.name) == by]
                is_blind = meaning.section not in OPINIONS and any(run.networks[by.name].blind_for for run in runs)
                row = Row(meaning.label, meaning.reading, chapter.called(by), cells, real, is_blind)
                rows[meaning.section].append(row)
                break
    return [Section(titles[name], tuple(of)) for name, of in rows.items() if of]


def damage_tables(chapter: Chapter) -> Iterator[DamageTable]:
    """What known damage to real patches does to the figures of each run."""
    for run in chapter.runs:
        found = {(f.method, f.quantity, f.extractor): f for f in run.metrics.values if f.method.startswith(DAMAGED)}
        keys = list(dict.fromkeys((quantity, by) for _, quantity, by in found))
        columns = tuple(words_of(quantity).label + (f", {by}" if by else "") for quantity, by in keys)
        names = dict.fromkeys(method for method, *_ in found)
        rows = tuple((name.removeprefix(DAMAGED), tuple(cell(found.get((name, *k))) for k in keys)) for name in names)
        if rows:
            yield DamageTable(f"{chapter.of_run(run)}Known damage to real patches", columns, rows)


def spectrum(chapter: Chapter) -> Chart | None:
    """The mean log10 power of frames of level 1, and of real target patches, by frequency: which scale is wrong."""
    styles, series = baseline_styles(chapter), []
    found = [(m.name, style_of(m.slot), m.run.metrics.spectra.get(m.key)) for m in chapter.methods]
    found += [(b.name, styles[b.name], b.run.metrics.spectra.get(b.key)) for b in chapter.baselines]
    found.append((f"real {chapter.target}", REAL, chapter.runs[0].metrics.spectra.get("real target")))
    for name, style, power in found:
        if power:
            points = (Point((k + 1) / len(power), value) for k, value in enumerate(power) if value is not None)
            series.append(Series(name, style, tuple(points)))
    axis = "frequency (1: one period in 2 px)"
    return Chart("spectrum", "log10 power of level 1, grey", tuple(series), axis=axis) if series else None


def baseline_styles(chapter: Chapter) -> dict[str, str]:
    """By name; baselines of one kind look alike in whatever run they were made."""
    kinds = list(dict.fromkeys(baseline.key for baseline in chapter.baselines))
    return {baseline.name: baseline_style(kinds.index(baseline.key)) for baseline in chapter.baselines}


class _Line(NamedTuple):
    """The figures of a method, a baseline or real patches over the levels."""

    name: str
    style: str
    figures: list[Figure]


def _lines(chapter: Chapter, quantity: str, by: Network) -> list[_Line]:
    """All lines of a quantity that have figures; last that of real patches, where they have levels."""
    levels, styles = levels_of(chapter), baseline_styles(chapter)
    columns = [(m, style_of(m.slot)) for m in chapter.methods] + [(b, styles[b.name]) for b in chapter.baselines]
    found = [(of.name, style, [find(of, quantity, by, level) for level in levels]) for of, style in columns]
    floor = floor_of(quantity)
    which, of_real, name = "scored", quantity, "real patches whose score is the level"
    if floor and floor[0] == "own":
        which, of_real, name = *floor, "real vs real"
    if which == "own" or quantity.startswith(OF_NUCLEI):
        found.append((name, REAL, [_first_real(chapter, which, of_real, by, level) for level in levels]))
    lines = (_Line(name, style, [figure for figure in of if figure is not None]) for name, style, of in found)
    return [line for line in lines if line.figures]


def _first_real(chapter: Chapter, which: str, quantity: str, by: Network, level: float | None = None) -> Figure | None:
    """A figure of real patches by this very network, from the first run that has it."""
    found = (run.real(which, quantity, by.name, level) for run in chapter.runs if run.network(by.name) == by)
    return next((figure for figure in found if figure is not None), None)


def level_tables(chapter: Chapter) -> Iterator[LevelTable]:
    """Every quantity that has levels, method by method."""
    for quantity, by in _keys(chapter):
        if lines := _lines(chapter, quantity, by):
            used = sorted({figure.level for line in lines for figure in line.figures})
            rows = ((line.name, {figure.level: cell(figure) for figure in line.figures}) for line in lines)
            filled = tuple((name, tuple(map(cells.get, used))) for name, cells in rows)
            yield LevelTable(_title(quantity, chapter.called(by), ", "), tuple(used), filled)


def curves(chapter: Chapter) -> list[tuple[str, Chart]]:
    """(section, chart) of every quantity that has levels."""
    charts = []
    for quantity, by in _keys(chapter):
        section, called, of_nuclei = words_of(quantity).section, chapter.called(by), quantity.startswith(OF_NUCLEI)
        series = []
        for name, style, figures in _lines(chapter, quantity, by):
            points = (Point(f.level, f.value, f.low, f.high, f.n) for f in figures if f.value is not None)
            series.append(Series(name, style, tuple(points)))
        series = tuple(one for one in series if one.points)
        if any((len(s.points) > 1 or of_nuclei) and s.style.startswith("m") for s in series):
            is_p = quantity == "probability"
            key = quantity.removeprefix(OF_NUCLEI) if of_nuclei else f"{'p' if is_p else quantity}:{called}"
            chart = Chart(key, _title(quantity, called, " — "), series, _bands(chapter, quantity, by), is_p)
            charts.append((section, chart))
    return charts


def _bands(chapter: Chapter, quantity: str, by: Network) -> tuple[Band, ...]:
    """What real patches reach, where that has no levels."""
    floor = floor_of(quantity)
    asked = [("target", quantity, f"real {chapter.target}"), ("source", quantity, f"real {chapter.source}")]
    if floor is not None:
        asked = [(*floor, "real vs real" if floor[1].endswith("_floor") else "of real patches")]
    found = ((name, _first_real(chapter, which, of, by)) for which, of, name in asked)
    return tuple(Band(name, f.value, f.low, f.high) for name, f in found if f is not None and f.value is not None)


def nuclei_charts(chapter: Chapter) -> list[Chart]:
    """The curves of cellularity.json, with what real patches of both classes have."""
    return [chart for section, chart in curves(chapter) if section == "nuclei"]

"""The figures of a chapter as tables and curves: methods and baselines across, floors and real patches beside them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from cellflux_bridge.metrics.words import NUCLEI, QUANTITIES, SECTIONS, floor_of, interval, number, words
from cellflux_bridge.report.charts import REAL, Band, Chart, Point, Series, baseline_style, style_of
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


def cell(value: dict[str, Any] | None, remark: str = "") -> Cell | None:
    if value is None:
        return None
    basis = f"n = {value['n']}" + (f", against {value['n_real']} real" if value["n_real"] is not None else "")
    return Cell(number(value["value"]), interval(value["low"], value["high"]), remark, basis)


def _keys(chapter: Chapter) -> list[tuple[str, Network]]:
    """Quantities with their networks: known quantities in the order of their words, networks in that of the runs."""
    values = ((run, value) for run in chapter.runs for value in run.metrics["values"])
    rows = {(value["quantity"], run.network(value["extractor"])): None for run, value in values}
    order = list(QUANTITIES)
    return sorted(rows, key=lambda row: order.index(row[0]) if row[0] in order else len(order))


def find(method: Method, quantity: str, by: Network, level: float | None) -> dict[str, Any] | None:
    """A figure of a method by this very network."""
    return method.value(quantity, level, by.name) if method.run.network(by.name) == by else None


def levels_of(chapter: Chapter) -> list[float]:
    return sorted({v["level"] for run in chapter.runs for v in run.metrics["values"] if v["level"] is not None})


def _main(method: Method, quantity: str, by: Network, where: str, levels: list[float]) -> Cell | None:
    if where == "whole":
        device = method.record.get("device") if quantity == "seconds" else None
        return cell(find(method, quantity, by, None), device or "")
    if where == "end":
        return cell(find(method, quantity, by, 1.0))
    found = [value for level in levels if level > 0 and (value := find(method, quantity, by, level)) is not None]
    found = [value for value in found if value["value"] is not None]
    pick = min if where == "smallest" else max
    worst = pick(found, key=lambda value: value["value"], default=None)
    return None if worst is None else cell(worst, f"at {worst['level']:g}")


def _real(chapter: Chapter, quantity: str, by: Network) -> tuple[Cell, ...]:
    """What real patches reach, once where runs agree: the floor of a distance, else both classes' own figure."""
    cells = {}
    for run in (run for run in chapter.runs if run.network(by.name) == by):
        floor = floor_of(quantity)
        if floor is not None:
            at = 1.0 if floor[0] == "own" else None
            cells[cell(run.real(*floor, by.name, at), "floor" if at is None else "floor at 1")] = None
        else:
            for which, label in (("target", chapter.target), ("source", chapter.source)):
                cells[cell(run.real(which, quantity, by.name), label)] = None
    return tuple(found for found in cells if found is not None)


def main_table(chapter: Chapter) -> list[Section]:
    """The figures of whole sequences and of level 1, by question; a row a quantity and network."""
    columns, levels = (*chapter.methods, *chapter.baselines), levels_of(chapter)
    rows: dict[str, list[Row]] = {name: [] for name in SECTIONS}
    for quantity, by in _keys(chapter):
        meaning = words(quantity)
        wheres = [meaning.where, *(w for w in ("whole", "end") if w != meaning.where)]
        for where in wheres:
            cells = tuple(_main(column, quantity, by, where, levels) for column in columns)
            if any(cells):
                real = _real(chapter, quantity, by)
                rows[meaning.section].append(Row(meaning.label, meaning.reading, chapter.called(by), cells, real))
                break
    return [Section(SECTIONS[name], tuple(of)) for name, of in rows.items() if of]


class LevelTable(NamedTuple):
    title: str
    levels: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


def level_tables(chapter: Chapter) -> Iterator[LevelTable]:
    """Every quantity that has levels, method by method; the chapter's nuclei after them."""
    levels = levels_of(chapter)
    for quantity, by in _keys(chapter):
        rows = []
        for column in (*chapter.methods, *chapter.baselines):
            values = [find(column, quantity, by, level) for level in levels]
            if any(values):
                rows.append((column.name, tuple(map(cell, values))))
        if rows:
            used = [k for k in range(len(levels)) if any(cells[k] for _, cells in rows)]
            kept = tuple((name, tuple(cells[k] for k in used)) for name, cells in rows)
            title = words(quantity).label.removesuffix(", worst") + (f", {chapter.called(by)}" if by.name else "")
            yield LevelTable(title, tuple(levels[k] for k in used), kept)
    for chart in nuclei_charts(chapter):
        points = {series.name: {point.level: point for point in series.points} for series in chart.series}
        used = sorted({level for of in points.values() for level in of})
        rows = ((name, tuple(_cell_of(of.get(level)) for level in used)) for name, of in points.items())
        yield LevelTable(chart.title, tuple(used), tuple(rows))


def _cell_of(point: Point | None) -> Cell | None:
    return point and Cell(number(point.value), interval(point.low, point.high), basis=f"n = {point.n}")


def _curve(name: str, style: str, values: list[dict[str, Any] | None]) -> Series | None:
    found = [v for v in values if v is not None and v["value"] is not None]
    points = tuple(Point(v["level"], v["value"], v["low"], v["high"], v["n"]) for v in found)
    return Series(name, style, points) if points else None


def baseline_styles(chapter: Chapter) -> dict[str, str]:
    """By name; baselines of one kind look alike in whatever run they were made."""
    kinds = list(dict.fromkeys(baseline.key for baseline in chapter.baselines))
    return {baseline.name: baseline_style(kinds.index(baseline.key)) for baseline in chapter.baselines}


def _series(chapter: Chapter, quantity: str, by: Network) -> tuple[Series, ...]:
    levels = levels_of(chapter)
    curves = [
        _curve(m.name, style_of(m.slot), [find(m, quantity, by, level) for level in levels]) for m in chapter.methods
    ]
    styles = baseline_styles(chapter)
    curves += [
        _curve(b.name, styles[b.name], [find(b, quantity, by, level) for level in levels]) for b in chapter.baselines
    ]
    floor = floor_of(quantity)
    if floor is not None and floor[0] == "own":
        run = next(run for run in chapter.runs if run.network(by.name) == by)
        curves.append(_curve("real vs real", REAL, [run.real(*floor, by.name, level) for level in levels]))
    return tuple(curve for curve in curves if curve is not None)


def _bands(chapter: Chapter, quantity: str, by: Network) -> tuple[Band, ...]:
    run = next((run for run in chapter.runs if run.network(by.name) == by), None)
    floor = floor_of(quantity)
    if run is None or (floor is not None and floor[0] == "own"):  # which has levels, hence a curve
        return ()
    if floor is not None:
        name = "real vs real" if floor[1].endswith("_floor") else "of real patches"
        found = [(name, run.real(*floor, by.name))]
    else:
        found = [(f"real {chapter.target}", run.real("target", quantity, by.name))]
        found += [(f"real {chapter.source}", run.real("source", quantity, by.name))]
    return tuple(
        Band(name, value["value"], value["low"], value["high"])
        for name, value in found
        if value is not None and value["value"] is not None
    )


def curves(chapter: Chapter) -> list[tuple[str, Chart]]:
    """(section, chart) of every quantity that has levels."""
    charts = []
    for quantity, by in _keys(chapter):
        series = _series(chapter, quantity, by)
        if any(len(s.points) > 1 and s.style.startswith("m") for s in series):
            meaning = words(quantity)
            called = chapter.called(by)
            title = meaning.label.removesuffix(", worst") + (f" — {called}" if called else "")
            key = f"p:{called}" if quantity == "probability" else f"{quantity}:{called}"
            bands, diagonal = _bands(chapter, quantity, by), quantity == "probability"
            charts.append((meaning.section, Chart(key, title, series, bands, diagonal)))
    return charts


def nuclei_charts(chapter: Chapter) -> list[Chart]:
    """The curves of cellularity.json: every quantity over the level, with what real patches of both classes have."""
    entries = [(method, method.cellularity) for method in chapter.methods if method.cellularity is not None]
    quantities = {curve["quantity"]: None for _, entry in entries for curve in entry["curves"]}
    charts = []
    for quantity in quantities:
        series = [
            _curve(
                m.name, style_of(m.slot), [{**c, "value": c["mean"]} for c in e["curves"] if c["quantity"] == quantity]
            )
            for m, e in entries
        ]
        scored = {
            point["level"]: {**point, "value": point["mean"]}
            for run in chapter.runs
            for point in (run.cellularity or {}).get("real_by_level", ())
            if point["quantity"] == quantity
        }
        series.append(_curve("real patches of the level's score", REAL, [scored[level] for level in sorted(scored)]))
        bands = {
            (f"real {real['class']}", real["mean"], real["low"], real["high"]): None
            for run in chapter.runs
            for real in (run.cellularity or {"real": []})["real"]
            if real["quantity"] == quantity and real["mean"] is not None
        }
        found = tuple(s for s in series if s is not None)
        if found:
            charts.append(Chart(quantity, NUCLEI.get(quantity, quantity), found, tuple(Band(*b) for b in bands)))
    return charts


def nuclei_table(chapter: Chapter) -> list[Row]:
    """Cellularity at level 1 and its rank correlation with the level, beside real patches."""
    rows = []
    entries = [method.cellularity for method in chapter.methods]
    quantities = {c["quantity"]: None for entry in entries if entry for c in entry["curves"]}
    for quantity in quantities:
        ends, ranks = [], []
        for entry in entries:
            of = [c for c in (entry or {"curves": []})["curves"] if c["quantity"] == quantity]
            last = max(of, key=lambda c: c["level"], default=None)
            rho = [s for s in (entry or {"spearman": []})["spearman"] if s["quantity"] == quantity]
            ends.append(cell(last and {**last, "value": last["mean"], "n_real": None}))
            ranks.append(cell({**rho[0], "n_real": None}) if rho else None)
        real = {
            cell({**r, "value": r["mean"], "n_real": None}, r["class"]): None
            for run in chapter.runs
            for r in (run.cellularity or {"real": []})["real"]
            if r["quantity"] == quantity
        }
        label = NUCLEI.get(quantity, quantity)
        rows.append(Row(label, "at level 1; real target patches are the aim", "", tuple(ends), tuple(real)))
        rows.append(
            Row(f"{label}: rank correlation", "Spearman with the level, mean over sequences", "", tuple(ranks), ())
        )
    return [row for row in rows if any(row.cells)]

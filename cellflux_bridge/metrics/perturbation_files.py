"""What `perturbations` writes: figures as JSON, CSV and Markdown, and pictures of cells.

<output>/perturbations.json, .csv   every figure with its interval and number
<output>/perturbations.md           a table of methods
<output>/cells/<perturbation>.png   real cells, controls, and what each method makes of these
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_rows, csv_text, replace_text, safe_name
from cellflux_bridge.metrics.perturbation import Cells, Row

FORMAT = 1
# What stands beside every method: what perfect cells would reach, and what no treatment would.
REAL, CONTROLS = "real training cells", "controls, untreated"
# Pictures of perturbations that are drawn at most, and cells of each.
MOST_DRAWN, _NUM_SHOWN = 48, 8
PLATE = {
    True: "Each real treated cell stands beside a cell that is made from a control of its own batch, for its own "
    "perturbation and dose.",
    False: "Each real treated cell stands beside a cell that is made from any control, for its own perturbation and "
    "dose.",
}
NOTES = (
    "FIDo, KIDo: all cells at once. FIDc, KIDc: means over perturbations of at least 5 cells, intervals over these. "
    "Compare only values of the same features and the same n: FID is biased upward at small n.",
    "real training cells: as many, at most half of those there are; perfect cells would reach this. controls, "
    "untreated: the sources themselves; no treatment would reach this.",
    "told: by a logistic regression on other real training cells, intervals over wells. The batch is kept where that "
    "of made cells is told as often as that of real test cells.",
    "effect on: the correlation, over perturbations and doses, of made with real log ratios to the controls of the "
    "batch: medians of area and intensity of the nucleus nearest to the middle, and the mean number of nuclei.",
    "condition swapped: how far cells move when only perturbation and dose change; a cosine near 1 means that they "
    "change the source alike whatever is asked.",
)
# Figures that tables show a hundredfold, as publications do.
HUNDREDFOLD = ("KIDo", "KIDc")


def shown(row: Row) -> str:
    """A figure with its interval as text; KID a hundredfold."""
    times = 100 if row.figure in HUNDREDFOLD else 1
    value, low, high = (times * number for number in row.estimate)
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) else "")


class Table(NamedTuple):
    """Figures of one kind of perturbations by one kind of features; `cells` are by (method, figure)."""

    title: str
    methods: list[str]
    figures: list[str]
    cells: dict[tuple[str, str], Row]

    def heading(self) -> list[str]:
        return [f"{figure} x100" if figure in HUNDREDFOLD else figure for figure in self.figures]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each kind of perturbations and of features."""
    found = []
    for group, by in dict.fromkeys((row.perturbations, row.by) for row in rows):
        own = [row for row in rows if (row.perturbations, row.by) == (group, by)]
        methods, figures = (list(dict.fromkeys(getattr(row, key) for row in own)) for key in ("method", "figure"))
        cells = {(row.method, row.figure): row for row in own}
        found.append(Table(f"{group} perturbations, by {by}", methods, figures, cells))
    return found


def _lines(table: Table) -> list[list[str]]:
    """A table as text: the heading, a line a method, and the numbers."""
    counts = {figure: row.num for (_, figure), row in table.cells.items()}
    body = [
        [method, *(shown(row) if (row := table.cells.get((method, figure))) else "-" for figure in table.figures)]
        for method in table.methods
    ]
    return [["method", *table.heading()], *body, ["n", *(str(counts[figure]) for figure in table.figures)]]


def write(rows: Sequence[Row], notes: Sequence[str], folder: Path, *, name: str, drawn: Sequence[str]) -> list[Path]:
    """Write JSON, CSV and Markdown; `drawn` names the perturbations whose pictures lie in `folder`/cells."""

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if math.isfinite(value) else None

    listed = [{**row._asdict(), "estimate": [number(v) for v in row.estimate], "num": int(row.num)} for row in rows]
    record = {"format": FORMAT, "name": name, "rows": listed, "notes": list(notes), "drawn": list(drawn)}
    table = [["method", "perturbations", "figure", "by", "value", "low", "high", "n"]]
    table += [[*row[:4], *map(number, row.estimate), row.num] for row in rows]
    lines = [f"# Perturbations: {name}", ""]
    for of in tables(rows):
        first, *others = _lines(of)
        listed_lines = [first, ["---"] * len(first), *others]
        lines += [f"## {of.title}", "", *(f"| {' | '.join(line)} |" for line in listed_lines), ""]
    lines += [f"- {note}" for note in notes]
    files = [folder / f"perturbations.{kind}" for kind in ("json", "csv", "md")]
    texts = (json.dumps(record, indent=1) + "\n", csv_text(table), "\n".join(lines) + "\n")
    for file, text in zip(files, texts, strict=True):
        replace_text(file, text)
    return files


def picture_of(folder: Path, label: str) -> Path:
    return folder / "cells" / f"{safe_name(label, room=4)}.png"


def draw(folder: Path, labels: Mapping[int, str], real: Cells, methods: Mapping[str, Cells]) -> list[str]:
    """Write a picture a perturbation: rows are real cells, then each method's; the first columns are of one control
    each. At the largest dose. Returns the names of those that are drawn."""
    from cellflux_bridge.images.panels import named_rows

    drawn = []
    for number, label in list(labels.items())[:MOST_DRAWN]:
        own = np.flatnonzero(real.labels == number)
        own = own[real.doses[own] == real.doses[own].max()][:_NUM_SHOWN] if len(own) else own
        if not len(own):
            continue
        rows = {"real treated cells": real.images[own], **{name: cells.images[own] for name, cells in methods.items()}}
        views = {name: [images.to_rgb(cell) for cell in found.transpose(0, 2, 3, 1)] for name, found in rows.items()}
        file = picture_of(folder, label)
        file.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(file, named_rows(views, scale=max(1, 96 // real.images.shape[-1])))
        drawn.append(label)
    return drawn


def read_moa(table: Path, classes: Sequence[str]) -> dict[int, str]:
    """The mode of action of each class that a table knows, by the class's number. UserError for a table without columns
    name and moa, and one that knows no class."""
    try:
        rows = list(csv_rows(table))
    except OSError as error:
        raise UserError(f"--moa {table}: cannot be read ({error.strerror})") from error
    if not rows or not {"name", "moa"} <= rows[0].keys():
        raise UserError(f"--moa {table}: expected columns name and moa, found {', '.join(rows[0]) if rows else 'none'}")
    known = {row["name"]: row["moa"] for row in rows if row["moa"]}
    found = {number: known[label] for number, label in enumerate(classes) if label in known}
    if not found:
        raise UserError(f"--moa {table}: names none of the perturbations ({abbreviate(classes)})")
    return found

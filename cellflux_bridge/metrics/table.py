"""An evaluation as Markdown: quantities down, methods, baselines and real patches across."""

from collections.abc import Iterator, Sequence

import numpy as np

from cellflux_bridge.data.patches import SCORE_WINDOW
from cellflux_bridge.metrics.evaluate import Evaluation
from cellflux_bridge.metrics.manifold import FIGURES as MANIFOLD
from cellflux_bridge.metrics.reference_set import REAL_OWN, REAL_POOLED, REAL_SCORED, REAL_SOURCE, REAL_TARGET
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.words import QUANTITIES, number

# What a label says of the levels that its cells are of (`words.Words`).
_LEVELS = {
    "end": " at 1",
    "mean": ", mean over levels",
    "inner": ", worst below level 1",
    **dict.fromkeys(("largest", "smallest"), ", worst level"),
}
_USES = {"judge": "judge", "features": "extractor that neither guided nor judges", "scores": "severity estimator"}
_KINDS = {"KID": "kid", "Frechet distance": "frechet", **{figure: figure for figure in MANIFOLD}}


class _Cells:
    """Values by method, quantity, level and network, as the text of cells; "" where there is none."""

    def __init__(self, evaluation: Evaluation):
        self._rows = {(v.method, v.quantity, v.level, v.extractor): v for v in evaluation.reference.rows}
        self._devices = {of.name: of.cost.device for of in evaluation.methods if of.cost is not None}
        self._levels = evaluation.methods[0].levels

    def get(self, method: str, quantity: str, level: float | None = None, by: str = "") -> Value | None:
        return self._rows.get((method, quantity, level, by))

    def cell(self, method: str, quantity: str, by: str, where: str) -> str:
        """`where` as in `words.Words`; real patches of a class have one value for level 1 and no level."""
        if where in ("end", "whole"):
            at = 1.0 if where == "end" and method not in (REAL_SOURCE, REAL_TARGET) else None
            text = _text(self.get(method, quantity, at, by))
            return f"{text} ({self._devices[method]})" if text and quantity == "seconds" else text
        levels = self._levels[: -1 if where == "inner" else None]
        found = [value for level in levels if (value := self.get(method, quantity, level, by)) is not None]
        if not found:
            return ""
        if where == "mean":
            against = " to ".join(map(str, sorted({f(v.n_real for v in found) for f in (min, max)})))
            return f"{number(float(np.mean([v.value for v in found])))} (against {against})"
        worst = (min if where == "smallest" else max)(found, key=lambda value: value.value)
        return f"{_text(worst)} at {worst.level:g}"


def _text(value: Value | None) -> str:
    if value is None:
        return ""
    return number(value.value) + ("" if np.isnan(value.low) else f" [{number(value.low)}, {number(value.high)}]")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)), ""]


def markdown(evaluation: Evaluation) -> str:
    """The table of methods, notes on it, and the paired differences."""
    cells, source, target = _Cells(evaluation), *evaluation.transition
    columns = {of.name: f"{of.name} (n = {len(of.source_ids)})" for of in (*evaluation.methods, *evaluation.baselines)}
    for name, label in ((REAL_SOURCE, source), (REAL_TARGET, target)):
        columns[name] = f"real {label} (n = {cells.get(name, 'contrast').n})"
    rows = []
    for quantity, words in QUANTITIES.items():
        for where in words.table or (words.where,):
            for by in ("", *(network.name for network in evaluation.reference.networks)):
                label = words.label if where == "whole" else words.label.removesuffix(", worst") + _LEVELS[where]
                row = [cells.cell(column, quantity, by, where) for column in columns]
                if any(row[: len(evaluation.methods)]):
                    rows.append([f"{label}, {by}" if by else label, *row])
    lines = [f"# {source} to {target}, {evaluation.num_levels} levels", "", *_table(["", *columns.values()], rows)]
    lines += [*_notes(evaluation, cells), ""]
    if evaluation.differences:
        head = ["paired difference", "by", "n (groups)", "difference", "p"]
        lines += _table(head, [*_differences(evaluation)])
    return "\n".join(lines)


def by_level(evaluation: Evaluation) -> str:
    """One line a quantity, network and method: its value at every level."""
    levels = [0.0, *evaluation.methods[0].levels]
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for value in evaluation.reference.rows:
        if value.level is not None:
            lines.setdefault((value.quantity, value.extractor, value.method), {})[value.level] = number(value.value)
    rows = [[*key, *(line.get(level, "") for level in levels)] for key, line in sorted(lines.items()) if len(line) > 1]
    return "\n".join(_table(["by level", "by", "method", *(f"{level:g}" for level in levels)], rows))


def _notes(evaluation: Evaluation, cells: _Cells) -> Iterator[str]:
    yield "Square brackets: 95 % intervals, over groups of sources. Distances of different extractors do not compare."
    for network in evaluation.reference.networks:
        text = f"- {network.name}: {_USES[network.use]}, {network.view}, {network.checkpoint}"
        if floor := cells.get(REAL_POOLED, "kid_floor", None, network.name):
            spread = cells.get(REAL_POOLED, "kid_floor_spread", None, network.name)
            text += f"; real-vs-real KID of halves by group, {floor.n} against {floor.n_real} patches: mean "
            text += f"{number(floor.value)}, standard deviation {number(spread.value)}"
        if error := cells.get(REAL_SCORED, "severity_error", None, network.name):
            text += f"; its own error on {error.n} real patches: {_text(error)}; real patches of a level: score within "
            text += f"{SCORE_WINDOW:g}"
        yield text
    by = evaluation.reference.extractor.name
    for name, label in (
        (REAL_TARGET, f"real {evaluation.transition[1]} patches"),
        (REAL_POOLED, "real patches, pooled"),
    ):
        found = [cells.get(name, f"{key}_floor", None, by) for key in _KINDS.values()]
        floors = ", ".join(f"{kind} {_text(value)}" for kind, value in zip(_KINDS, found, strict=True))
        yield f"- floors of halves of {label} ({found[0].n} against {found[0].n_real}), {by}: {floors}"
    floors = ", ".join(f"{kind} {cells.cell(REAL_OWN, f'{key}_floor', by, 'mean')}" for kind, key in _KINDS.items())
    yield f"- floors of halves of the real patches of each level's own, mean over levels, {by}: {floors}"
    for guided, unguided in evaluation.unguided.items():
        yield f"- {guided} is compared to {unguided}"
    for warning in evaluation.warnings:
        yield f"- **warning**: {warning}"


def _differences(evaluation: Evaluation) -> Iterator[list[str]]:
    for row in evaluation.differences:
        first, second, quantity, extractor, n, difference, low, high, p, num_groups = row.values()
        label = f"{quantity.replace('_', ' ')}: {first} less {second}"
        text = f"{number(difference)} [{number(low)}, {number(high)}]"
        yield [label, extractor, f"{n} ({num_groups})", text, f"{p:.2g}"]

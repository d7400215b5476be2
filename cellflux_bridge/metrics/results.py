"""An evaluation as files: metrics.json, metrics.csv in long form, tables in metrics.md and the judges' probabilities of
every single frame in metrics.frames.csv (trajectory, source_id, judge, level, probability), each whole or not at all.
`base.files.csv_rows` reads both CSVs.

metrics.json, format 1; a number that does not exist is null:

    format, source, target, num_levels, seed, max_real (`metrics.evaluate`)
    networks      [{name, use: judge | features | scores, view, checkpoint, image_size, digest, blind_for}], a folder,
                  a digest of its weights, and the damage (`metrics.damage`) that it does not see
    methods       [{name, trajectory, method, config_hash, n, split, levels, frame_levels, device, unguided}], baselines
                  after them, with a null trajectory; `frame_levels` are the soft labels of the frames that stand for
                  `levels`; `device` is that of `seconds` ("cpu", "cuda: NAME", or null); a guided method is compared to
                  the method `unguided`
    values        [{trajectory, method, quantity, level, extractor, n, n_real, split, value, low, high}], as in
                  metrics.csv and `metrics.values`; `metrics.words` lists the quantities
    differences   [{first, second, quantity, extractor, n, difference, low, high, p, num_groups}], p of Wilcoxon's
                  signed-rank test on means of groups
    memorisation  {extractor, patches, num_training, num_held_out, num_near_copies, near_copies: [{method, trajectory,
                  source_id, level, training_id, distance, held_out}]}: at most the hundred worst frames that repeat a
                  training patch, or lie nearer to it (`distance`) than any held-out real patch lies to its nearest
                  training patch of that class (`held_out`), in the extractor's features; `num_held_out` are [those
                  nearest to training of the source, of the target], without those that repeat a training patch;
                  `patches` is the checkpoint in whose data `training_id` is
    spectra       {name: [mean log10 power at 1, 2, .. periods a side]} of frames of level 1 of every method and
                  baseline, and of "real target" patches
    warnings      [text]: sentences about figures that mislead
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellflux_bridge.base.files import csv_text, replace_text, require_json, without_nan
from cellflux_bridge.data.patches import SCORE_WINDOW
from cellflux_bridge.metrics.damage import DAMAGED, DAMAGES, RESPONSE, blind_for
from cellflux_bridge.metrics.evaluate import Evaluation
from cellflux_bridge.metrics.fidelity import NEIGHBOURHOOD_FIGURES
from cellflux_bridge.metrics.reference_set import REAL_OWN, REAL_POOLED, REAL_SCORED, REAL_SOURCE, REAL_TARGET
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.verdict import verdict
from cellflux_bridge.metrics.warnings import UNKNOWN
from cellflux_bridge.metrics.words import OPINIONS, QUANTITIES, number

FORMAT = 1
_MOST_COPIES, _WARNINGS_SHOWN = 100, 4
FRAMES_SUFFIX = ".frames.csv"
# What a label says of the levels that its cells are of (`words.Words`).
_LEVELS = {
    "end": " at 1",
    "mean": ", mean over levels",
    "inner": ", worst below level 1",
    **dict.fromkeys(("largest", "smallest"), ", worst level"),
}
_USES = {"judge": "judge", "features": "extractor that neither guided nor judges", "scores": "severity estimator"}
_KINDS = {"KID": "kid", "Frechet distance": "frechet", **{figure: figure for figure in NEIGHBOURHOOD_FIGURES}}


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of metrics.json."""
    keys = ("name", "use", "view", "checkpoint", "image_size", "digest")
    reference, extractor = evaluation.reference, evaluation.reference.extractor
    with_patches = extractor if extractor.weights is not None else reference.networks[0]
    # The worst first: exact copies, then those of the smallest share of the held-out distance.
    copies = sorted(evaluation.near_copies, key=lambda copy: copy["distance"] and copy["distance"] / copy["held_out"])
    blind = blind_for(reference.rows)
    return without_nan(
        {
            "format": FORMAT,
            "source": extractor.source,
            "target": extractor.target,
            "num_levels": len(evaluation.methods[0].levels),
            "seed": reference.seed,
            "max_real": reference.max_real,
            "networks": [
                {key: getattr(n, key) for key in keys}
                | {"checkpoint": str(n.checkpoint), "blind_for": blind.get(n.name, [])}
                for n in reference.networks
            ],
            "methods": [_method(of, evaluation) for of in (*evaluation.methods, *evaluation.baselines)],
            "values": [value._asdict() for value in evaluation.reference.rows],
            "differences": evaluation.differences,
            "memorisation": {
                "extractor": extractor.name,
                "patches": str(with_patches.checkpoint),
                "num_training": len(reference.training.ids),
                "num_held_out": [*map(len, reference.training.held_out)],
                "num_near_copies": len(evaluation.near_copies),
                "near_copies": copies[:_MOST_COPIES],
            },
            "spectra": {name: power.round(4).tolist() for name, power in reference.spectra.items()},
            "warnings": evaluation.warnings,
        }
    )


def _method(of: Sequences, evaluation: Evaluation) -> dict[str, Any]:
    trajectory, method, config_hash = None, None, None
    if of.folder is not None:  # no baseline
        trajectory, method, config_hash = str(of.folder), of.header.method, of.header.config_hash
    return {
        "name": of.name,
        "trajectory": trajectory,
        "method": method,
        "config_hash": config_hash,
        "n": len(of.source_ids),
        "split": of.split,
        "levels": of.levels,
        "frame_levels": of.frame_levels,
        "device": None if of.cost is None else of.cost.device,
        "unguided": evaluation.unguided.get(of.name),
    }


def _frames(evaluation: Evaluation) -> Iterator[list[Any]]:
    """The rows of metrics.frames.csv."""
    yield ["trajectory", "source_id", "judge", "level", "probability"]
    for of, judge in itertools.product(evaluation.methods, evaluation.reference.judges):
        for source_id, row in zip(of.source_ids, of.outputs[judge.name].value, strict=True):
            for level, p in zip((0.0, *of.frame_levels), row, strict=True):
                yield [str(of.folder), source_id, judge.name, level, f"{p:.4f}"]


def write_results(evaluation: Evaluation, output: Path) -> tuple[list[Path], str]:
    """Write `output` (a .json) and beside it .csv, .frames.csv and .md of its name; returns them and what a terminal
    should show."""
    require_json(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(evaluation)
    texts = {
        output: json.dumps(as_json(evaluation), indent=1, allow_nan=False) + "\n",
        output.with_suffix(".csv"): csv_text([Value._fields, *map(without_nan, evaluation.reference.rows)]),
        output.with_suffix(FRAMES_SUFFIX): csv_text(_frames(evaluation)),
        output.with_suffix(".md"): f"{table}\n{by_level(evaluation)}",
    }
    for path, text in texts.items():
        replace_text(path, text)
    return list(texts), summary(evaluation)


def summary(evaluation: Evaluation) -> str:
    """Of every method its verdict and the figures that decide; then the headline figures and the warnings."""
    rows = {(v.method, v.quantity, v.level, v.extractor): v.value for v in evaluation.reference.rows}
    source, target = (getattr(evaluation.reference.extractor, end) for end in ("source", "target"))
    lines = [f"level 0 = {source}, level 1 = {target}, {len(evaluation.methods[0].levels)} levels"]

    def find(*key: str | float | None) -> float | None:
        value = rows.get(key)
        return None if value is None or np.isnan(value) else value

    judges, extractor = [network.name for network in evaluation.reference.judges], evaluation.reference.extractor.name
    for of in evaluation.methods:
        found = verdict(find, of.name, judges, target=target, extractor=extractor)
        lines += ["", f"{of.name}, {len(of.source_ids)} sequences: {found.word}"]
        lines += [f"  {figure.text}" for figure in found.figures]
    headline = [quantity for quantity, words in QUANTITIES.items() if words.section == "real" and words.where == "end"]
    seen_by = [""] if extractor in blind_for(evaluation.reference.rows) else ["", extractor]
    cells, names = _Cells(evaluation), [of.name for of in (*evaluation.methods, *evaluation.baselines)]
    rows_of = [[QUANTITIES[q].label, *(cells.cell(n, q, by, "end") for n in names)] for q in headline for by in seen_by]
    table = [["", *names], *rows_of]
    table = [row for row in table if any(row[1:])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]
    warnings = [text for text in evaluation.warnings if not text.startswith(UNKNOWN)]
    shown = warnings[:_WARNINGS_SHOWN]
    lines += ["", *(f"warning: {text}" for text in shown)]
    lines += [f"({len(warnings) - len(shown)} more warnings in the .md)"] * (len(warnings) > len(shown))
    return "\n".join([*lines, ""])


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
    cells, networks = _Cells(evaluation), evaluation.reference.networks
    source, target, blind = networks[0].source, networks[0].target, blind_for(evaluation.reference.rows)
    columns = {of.name: f"{of.name} (n = {len(of.source_ids)})" for of in (*evaluation.methods, *evaluation.baselines)}
    for name, label in ((REAL_SOURCE, source), (REAL_TARGET, target)):
        columns[name] = f"real {label} (n = {cells.get(name, 'contrast').n})"
    rows = []
    for quantity, words in QUANTITIES.items():
        for where in words.table or (words.where,):
            for by in ("", *(network.name for network in networks)):
                label = words.label if where == "whole" else words.label.removesuffix(", worst") + _LEVELS[where]
                row = [cells.cell(column, quantity, by, where) for column in columns]
                if any(row[: len(evaluation.methods)]):
                    label += f", {by}" if by else ""
                    is_blind = by in blind and words.section not in OPINIONS
                    rows.append([f"({label}: blind)" if is_blind else label, *row])
    lines = [f"# {source} to {target}, {len(evaluation.methods[0].levels)} levels", ""]
    lines += [*_table(["", *columns.values()], rows), *_notes(evaluation, cells), ""]
    lines += _damage(evaluation)
    if evaluation.differences:
        head = ["paired difference", "by", "n (groups)", "difference", "p"]
        lines += _table(head, [*_differences(evaluation)])
    return "\n".join(lines)


def _damage(evaluation: Evaluation) -> list[str]:
    """What real target patches with known damage get, and how far each network sees them from undamaged ones."""
    cells, networks = _Cells(evaluation), evaluation.reference.networks
    first, extractor = f"{DAMAGED}{next(iter(DAMAGES))}", evaluation.reference.extractor.name
    keys = [(q, by) for q in QUANTITIES for by in ("", extractor) if q != RESPONSE and cells.get(first, q, None, by)]
    keys += [(RESPONSE, n.name) for n in networks if n.use != "scores"]
    head = [QUANTITIES[quantity].label + (f", {by}" if by else "") for quantity, by in keys]
    rows = [
        [name, *(_text(cells.get(DAMAGED + name, quantity, None, by)) for quantity, by in keys)] for name in DAMAGES
    ]
    floors = (cells.get(REAL_TARGET, f"{quantity.removesuffix('_target')}_floor", None, by) for quantity, by in keys)
    return _table(
        ["known damage to real patches", *head], [*rows, ["none (halves of real patches)", *map(_text, floors)]]
    )


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
    target = evaluation.reference.extractor.target
    for name, label in ((REAL_TARGET, f"real {target} patches"), (REAL_POOLED, "real patches, pooled")):
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
        label = f"{QUANTITIES[quantity].label}: {first} minus {second}"
        text = f"{number(difference)} [{number(low)}, {number(high)}]"
        yield [label, extractor, f"{n} ({num_groups})", text, f"{p:.2g}"]

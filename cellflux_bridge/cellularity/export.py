"""Curves as files: cellularity.json and, beside it, cellularity.csv in long form, each whole or not at all.

cellularity.json, format 2; a number that does not exist is null:

    format, mpp, seed
                  `mpp` microns per pixel, by which all was counted
    parameters    those of the segmentation, by name
    trajectories  [{trajectory, method, source, target, config_hash, n, levels, median_area, incomplete, unmeasured,
                    refused,
                    curves: [{quantity, level, n, mean, low, high}],
                    spearman: [{quantity, n, value, low, high}],
                    checks: [{quantity, end_minus_target, low, high, end: reached | missed | undecided, n_inner,
                             inner_between, n_scored, distance_to_real}],
                    per_source: [{source_id, <quantity>: [one number a level]}]}]
                  `n` sources; `median_area` px a nucleus; `incomplete` sequences that lack rows in the manifest and are
                  left out; `unmeasured` frames in which nuclei cannot be sought; `refused` quantities that need larger
                  nuclei; the rest as in `cellularity.curves`
    real          [{class, quantity, n, mean, low, high}] of real test patches, or of the given folders
    real_by_level [{quantity, level, n, mean, low, high}] of real test patches that have the level as their score

cellularity.csv: what (curve, spearman, end_minus_target, inner_between,
distance_to_real, real, real_by_level), trajectory, method, class, quantity,
level, n, value, low, high, end (of end_minus_target).
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cellflux_bridge.base.files import replace_text, require_json, without_nan
from cellflux_bridge.cellularity.curves import Curves, Point
from cellflux_bridge.cellularity.measurement import QUANTITIES
from cellflux_bridge.cellularity.nuclei import Parameters

FORMAT = 2
_COLUMNS = ("what", "trajectory", "method", "class", "quantity", "level", "n", "value", "low", "high", "end")


def as_json(
    curves: list[Curves],
    real: dict[str, tuple[Point, ...]],
    by_level: tuple[Point, ...],
    *,
    mpp: float | None,
    parameters: Parameters,
    seed: int,
) -> dict[str, Any]:
    """The content of cellularity.json; `real` by class."""
    content = {
        "format": FORMAT,
        "mpp": mpp,
        "seed": seed,
        "parameters": asdict(parameters),
        "trajectories": [_trajectory(each) for each in curves],
        "real": [{"class": name, **_without_level(point)} for name, points in real.items() for point in points],
        "real_by_level": [point._asdict() for point in by_level],
    }
    return without_nan(content)


def _without_level(point: Point) -> dict[str, Any]:
    return {key: value for key, value in point._asdict().items() if key != "level"}


def _trajectory(of: Curves) -> dict[str, Any]:
    shown = dict.fromkeys(point.quantity for point in of.curves)
    return {
        "trajectory": str(of.folder),
        **{key: getattr(of.header, key) for key in ("method", "source", "target", "config_hash", "levels")},
        "n": len(of.source_ids),
        "median_area": of.counted.median_area,
        "incomplete": of.incomplete,
        "unmeasured": of.unmeasured,
        "refused": of.refused,
        "curves": [point._asdict() for point in of.curves],
        "spearman": [row._asdict() for row in of.spearman],
        "checks": [row._asdict() for row in of.checks],
        "per_source": [
            {"source_id": source, **{name: values[:, QUANTITIES.index(name)].tolist() for name in shown}}
            for source, values in zip(of.source_ids, of.counted.values, strict=True)
        ],
    }


def _rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for of in content["trajectories"]:
        whose = {"trajectory": of["trajectory"], "method": of["method"]}
        for point in of["curves"]:
            yield whose | {"what": "curve", **point, "value": point["mean"]}
        for row in of["spearman"]:
            yield whose | {"what": "spearman", **row}
        for row in of["checks"]:
            whom = whose | {"class": of["target"], "n": of["n"]}
            yield whom | {"what": "end_minus_target", **row, "value": row["end_minus_target"]}
            between = {"n": row["n_inner"], "value": row["inner_between"], "quantity": row["quantity"]}
            yield whose | {"what": "inner_between", **between}
            if row["n_scored"]:
                distance = {"n": row["n_scored"], "value": row["distance_to_real"], "quantity": row["quantity"]}
                yield whose | {"what": "distance_to_real", **distance}
    for row in content["real"]:
        yield {"what": "real", **row, "value": row["mean"]}
    for row in content["real_by_level"]:
        yield {"what": "real_by_level", **row, "value": row["mean"]}


def write_results(content: dict[str, Any], output: Path) -> list[Path]:
    """Write `output` (a .json) and beside it the .csv of its name; returns both."""
    require_json(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(_rows(content))
    replace_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    replace_text(output.with_suffix(".csv"), text.getvalue())
    return [output, output.with_suffix(".csv")]


def summary(content: dict[str, Any]) -> str:
    """The table for the terminal: real source, first level, last level, real target, rank correlation, checks."""
    real = {(row["class"], row["quantity"]): row for row in content["real"]}
    lines = []
    for of in content["trajectories"]:
        lines.append(f"{of['trajectory']}: {of['method']}, {of['source']} -> {of['target']}, {of['n']} sources")
        by_quantity: dict[str, list[dict]] = {}
        for point in of["curves"]:
            by_quantity.setdefault(point["quantity"], []).append(point)
        rho = {row["quantity"]: row["value"] for row in of["spearman"]}
        checked = {row["quantity"]: row for row in of["checks"]}
        head = (
            "",
            f"real {of['source']}",
            "level 0",
            "last level",
            f"real {of['target']}",
            "Spearman",
            "end",
            "between",
            "to real",
        )
        rows = [head]
        for name, points in by_quantity.items():
            check = checked.get(name)
            ends = [real.get((of["source"], name)), points[0], points[-1], real.get((of["target"], name))]
            end = "" if check is None else check["end"]
            between = "" if check is None else _number(check["inner_between"])
            distance = "" if check is None else _number(check["distance_to_real"])
            means = (_number(end and end["mean"]) for end in ends)
            rows.append((name, *means, _number(rho.get(name)), end, between, distance))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if of["refused"]:
            lines.append(f"  refused: {', '.join(of['refused'])}: nuclei of {of['median_area']:.0f} px are too small")
        if of["incomplete"]:
            lines.append(f"  {of['incomplete']} sequences lack rows in the manifest and were left out")
        if of["unmeasured"]:
            lines.append(f"  {of['unmeasured']} frames are grey or inverted and were left out")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

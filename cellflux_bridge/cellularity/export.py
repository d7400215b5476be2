"""cellularity.json and, beside it, cellularity.csv in long form, each written whole or not at all.

cellularity.json, format 3; a number that does not exist is null:

    format, mpp, seed
                  `mpp` microns per pixel, by which all was counted
    scale         {factor, diameter, agreement} at which the network saw all (see `parameters.Scale`); null for others
    parameters    those of the segmentation, by name
    trajectories  [{trajectory, method, source, target, config_hash, levels, n, median_area, incomplete, unmeasured,
                    refused, counter_error: {quantity: relative standard error},
                    curves: [{quantity, level, n, mean, low, high}],
                    spearman: [{quantity, n, value, low, high}],
                    checks: [{quantity, end_minus_target, low, high, end: reached | missed | undecided, n_inner,
                             inner_between, n_scored, distance_to_real}],
                    per_source: [{source_id, <quantity>: [one number a level]}]}]
    real          [{class, quantity, n, mean, low, high}] of real test patches, or of the given folders
    real_by_level [{quantity, level, n, mean, low, high}] of real test patches that have the level as their score

n                 sources of a trajectory, or images in which a quantity exists; low and high: its 95 % interval
median_area       px a nucleus
incomplete        sequences that lack rows in the manifest and are left out
unmeasured        frames in which nuclei cannot be sought (grey, dark, inverted)
refused           quantities that need larger nuclei
counter_error     of means, by the built-in network's bias on foreign tissue; `curves` and `real` take it in
spearman          mean over sources of the rank correlation with the level
end_minus_target  mean at the last level less that of real target patches, both sides resampled; `end` is its verdict
inner_between     share of the `n_inner` inner levels whose mean lies between the means of both real classes
distance_to_real  mean over `n_scored` levels of |curve - mean of real patches whose score is the level|

cellularity.csv: what (curve, spearman, end_minus_target, inner_between,
distance_to_real, real, real_by_level), trajectory, method, class, quantity,
level, n, value, low, high, end (of end_minus_target).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellflux_bridge.base.files import csv_text, replace_text, require_json

_COLUMNS = ("what", "trajectory", "method", "class", "quantity", "level", "n", "value", "low", "high", "end")
_HEAD = ("", "real {source}", "level 0", "last level", "real {target}", "Spearman", "end", "between", "to real")
_LEGEND = (
    "  Areas are in px (_um2: square microns). Spearman: rank correlation with the level, mean over sources.\n"
    "  end: is real {target} reached? between: share of inner levels that lie between both real classes.\n"
    "  to real: mean distance to real patches of the same level."
)
_SCALE = "Nuclei are {diameter:.1f} px across; the network saw {factor:.2f} px for each (agreement {agreement:.2f})."
# Remarks of the summary about numbers that are not 0.
_REMARKS = {
    "refused": "  refused: {refused}: nuclei of {median_area:.0f} px are too small",
    "incomplete": "  {incomplete} sequences lack rows in the manifest and were left out",
    "unmeasured": "  {unmeasured} frames are grey or inverted and were left out",
}


def _rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for of in content["trajectories"]:
        whose = {"trajectory": of["trajectory"], "method": of["method"]}
        yield from (whose | {"what": "curve", **row, "value": row["mean"]} for row in of["curves"])
        yield from (whose | {"what": "spearman", **row} for row in of["spearman"])
        for row in of["checks"]:
            end = {"class": of["target"], "n": of["n"], **row, "value": row["end_minus_target"]}
            yield whose | {"what": "end_minus_target"} | end
            for what, n in (("inner_between", row["n_inner"]), ("distance_to_real", row["n_scored"])):
                if n or what == "inner_between":
                    yield whose | {"what": what, "n": n, "value": row[what], "quantity": row["quantity"]}
    for what in ("real", "real_by_level"):
        yield from ({"what": what, **row, "value": row["mean"]} for row in content[what])


def write_results(content: dict[str, Any], output: Path) -> list[Path]:
    """Write `output` (a .json) and beside it the .csv of its name; returns both."""
    require_json(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = csv_text([_COLUMNS, *([row.get(column) for column in _COLUMNS] for row in _rows(content))])
    replace_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    replace_text(output.with_suffix(".csv"), table)
    return [output, output.with_suffix(".csv")]


def summary(content: dict[str, Any]) -> str:
    """The table for the terminal: real source, first level, last level, real target, rank correlation, checks."""

    def find(rows: list[dict], key: str, **wanted: str) -> float | str | None:
        return next((row[key] for row in rows if all(row[k] == v for k, v in wanted.items())), None)

    lines = []
    for of in content["trajectories"]:
        lines.append("{trajectory}: {method}, {source} -> {target}, {n} sources".format(**of))
        rows = [[cell.format(**of) for cell in _HEAD]]
        for name in dict.fromkeys(row["quantity"] for row in of["curves"]):
            curve = [row["mean"] for row in of["curves"] if row["quantity"] == name]
            real = [find(content["real"], "mean", quantity=name, **{"class": of[end]}) for end in ("source", "target")]
            check = (find(of["checks"], key, quantity=name) for key in ("end", "inner_between", "distance_to_real"))
            values = [real[0], curve[0], curve[-1], real[1], find(of["spearman"], "value", quantity=name), *check]
            rows.append([name, *map(_text, values)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        shown = {**of, "refused": ", ".join(of["refused"])}
        lines.append(_LEGEND.format(**of))
        lines += [remark.format(**shown) for key, remark in _REMARKS.items() if shown[key]]
    if (scale := content["scale"]) is not None and scale["diameter"] is not None:
        lines.append(_SCALE.format(**scale))
    return "\n".join(lines)


def _text(value: float | str | None) -> str:
    return value or "" if value is None or isinstance(value, str) else f"{value:.4g}"

"""The JSON files of a run as far as a report reads them: checked once, so that damage ends in a sentence."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.along import FORMAT as CELLULARITY_FORMAT
from cellflux_bridge.cellularity.nuclei import Parameters
from cellflux_bridge.metrics.results import FORMAT

_METRICS = {
    "format": int, "source": str, "target": str, "networks": list, "methods": list, "values": list, "differences": list,
}  # fmt: skip
_CELLULARITY = {"format": int, "parameters": dict, "trajectories": list, "real": list}
# The keys of the objects in a list of that name.
_ROWS = {
    "networks": {"name", "use", "view", "checkpoint", "image_size"},
    "methods": {"name", "trajectory", "method", "config_hash", "n", "levels", "frame_levels"},
    "values": {"method", "quantity", "level", "extractor", "n", "n_real", "value", "low", "high"},
    "differences": {"first", "second", "quantity", "extractor", "n", "difference", "low", "high", "p", "num_groups"},
    "trajectories": {"trajectory", "config_hash", "levels", "curves", "spearman", "per_source"},
    "real": {"class", "quantity", "n", "mean", "low", "high"},
}


def read_metrics(file: Path) -> dict[str, Any]:
    """metrics.json. Like all here raises UserError, which names what is wrong and the command that makes it anew."""
    anew = f"make it anew with: cellflux-bridge evaluate TRAJECTORY ... --output {file}"
    data = _read(file, _METRICS, anew)
    _require_format(file, data, FORMAT, anew)
    if not any(network["use"] == "judge" for network in data["networks"]):
        raise UserError(f"{file}: names no judge among its networks; {anew}")
    return data


def read_cellularity(file: Path) -> dict[str, Any]:
    """cellularity.json."""
    anew = f"make it anew with: cellflux-bridge cellularity TRAJECTORY ... --output {file}"
    data = _read(file, _CELLULARITY, anew)
    _require_format(file, data, CELLULARITY_FORMAT, anew)
    unknown = data["parameters"].keys() - {field.name for field in fields(Parameters)}
    if unknown:
        raise UserError(f"{file}: unknown parameters {', '.join(sorted(unknown))}; {anew}")
    return data


def _read(file: Path, shape: dict[str, type], remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {remedy}") from error
    wrong = [key for key, kind in shape.items() if not isinstance(data, dict) or not isinstance(data.get(key), kind)]
    if wrong:
        expected = f"expected an object with {', '.join(shape)}"
        raise UserError(f"{file}: {expected}; {', '.join(wrong)} missing or wrong; {remedy}")
    for key in shape.keys() & _ROWS.keys():
        if not all(isinstance(row, dict) and row.keys() >= _ROWS[key] for row in data[key]):
            raise UserError(f"{file}: {key}: expected objects with {', '.join(sorted(_ROWS[key]))}; {remedy}")
    return data


def _require_format(file: Path, data: dict[str, Any], known: int, anew: str) -> None:
    if data["format"] != known:
        raise UserError(f"{file}: format {data['format']}, this version reads {known}; {anew}")

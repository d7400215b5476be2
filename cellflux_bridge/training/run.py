"""The folder of a run: who may write into it, and its log."""

import csv
import json
from pathlib import Path
from typing import Any

from cellflux_bridge.config import Config, load_config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.records import SPLITS
from cellflux_bridge.errors import UserError

# What may change between the parts of one run: where things are, how long and how often, on which devices.
_MAY_CHANGE = (
    "name",
    "output",
    "translate",
    "video",
    "data.root",
    "data.cache_dir",
    "data.workers",
    "train.steps",
    "train.max_minutes",
    "train.resume",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.validate_every",
    "train.sample_every",
    "train.tensorboard",
    "train.accelerator",
    "train.devices",
    "train.num_nodes",
    "train.strategy",
)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    joined = {}
    for key, item in value.items():
        joined |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return joined


def claim(folder: Path, config: Config, *, ignore: tuple[str, ...], resume: str) -> None:
    """Make sure that `folder` is free or holds this very run; `ignore` names sections this run does not use.

    Raises UserError that lists the differing keys where it holds another run, and where `resume` is "never" and
    there is something to resume.
    """
    saved = folder / "config.yaml"
    if saved.exists():
        if resume == "never":
            raise UserError(f"{folder}: holds a run already; set train.resume=auto, another output, or remove it")
        before, now = (_flat(c.model_dump(mode="json")) for c in (load_config(saved), config))
        skip = _MAY_CHANGE + ignore
        keys = [k for k in sorted(before.keys() | now.keys()) if not any(k == s or k.startswith(s + ".") for s in skip)]
        differing = [f"{k} ({before.get(k)!r} there, {now.get(k)!r} here)" for k in keys if before.get(k) != now.get(k)]
        if differing:
            raise UserError(
                f"{folder}: holds another run; they differ in {', '.join(differing[:5])}"
                f"{' and more' if len(differing) > 5 else ''}. Choose another output or remove the folder"
            )
    elif folder.exists() and any(folder.glob("checkpoints/step-*")):
        raise UserError(f"{folder}: holds checkpoints without a config.yaml; choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    saved.write_text(config.to_yaml(), encoding="utf-8")


def record_splits(folder: Path, patches: Patches) -> None:
    """Write `splits.csv`: which patch trained, validated and tested, whoever decided it."""
    with open(folder / "splits.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        for i, patch_id in enumerate(patches.ids):
            label, split = patches.classes[patches.labels[i]], SPLITS[patches.splits[i]]
            writer.writerow([patch_id, label, split, patches.group_names[patches.groups[i]]])


class Log:
    """`metrics.jsonl` of a run, one JSON object a line with its step, and TensorBoard where it is asked for."""

    def __init__(self, folder: Path, *, from_step: int, tensorboard: bool):
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            # What came after the checkpoint that is resumed will happen again.
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= from_step]
            self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._board = _tensorboard(folder) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard: tensorboard is not installed; run: pip install 'cellflux-bridge[tensorboard]'"
        ) from error
    return SummaryWriter(folder / "tensorboard")

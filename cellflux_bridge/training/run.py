"""The folder of a run: who may write into it, and its log."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_rows, csv_text, replace_text
from cellflux_bridge.base.locks import writing
from cellflux_bridge.config import PLACES_AND_PACE, Config, Root, load_config
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.patches import Patches


def differences(before: Root, now: Root, *, uses: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> list[str]:
    """The keys, with both values, in which two configurations describe different runs: of the sections that a run
    `uses` (None: all), less the keys and sections in `ignore`."""
    skip = (*PLACES_AND_PACE, "video", *ignore)
    flat_before, flat_now = (config.flat(of=uses, without=skip) for config in (before, now))
    return [
        f"{key} ({flat_before.get(key)!r} there, {flat_now.get(key)!r} here)"
        for key in sorted(flat_before.keys() | flat_now.keys())
        if flat_before.get(key) != flat_now.get(key)
    ]


def require_alike(
    folder: Path, trained: Root, config: Root, *, uses: Sequence[str], ignore: Sequence[str] = ()
) -> None:
    """UserError where the checkpoint `folder` was trained with another configuration than one that is to use it; `uses`
    and `ignore` are those of `differences`."""
    if differing := differences(trained, config, uses=uses, ignore=ignore):
        found = abbreviate(differing)
        raise UserError(
            f"{folder}: was trained otherwise and cannot be used with {found}; set these as they were, or train it "
            "again into another folder"
        )


def require_free(
    folder: Path,
    config: Root,
    *,
    uses: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    resume: str,
    section: str = "train",
) -> None:
    """UserError where `folder` holds another run (it lists the keys that differ), or, with `resume` "never", this one.

    `uses` and `ignore` are those of `differences`; `section` is that of the run's training. Another process that trains
    there is named, too.
    """
    if folder.exists():
        with writing(folder):
            pass
    saved = folder / "config.yaml"
    if not saved.exists():
        if any(folder.glob("checkpoints/step-*")):
            raise UserError(f"{folder}: holds checkpoints without a config.yaml; choose another output")
    elif resume == "never":
        raise UserError(f"{folder}: holds a run already; set {section}.resume=auto, another output, or remove it")
    elif differing := differences(load_config(saved, schema=type(config)), config, uses=uses, ignore=ignore):
        found = abbreviate(differing)
        raise UserError(f"{folder}: holds another run; they differ in {found}. Choose another output or remove it")


def claim(folder: Path, config: Config) -> None:
    """Write a run's `config.yaml`; only when nothing speaks against the run, so that a refusal leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", config.to_yaml())


def record_splits(folder: Path, patches: Patches) -> None:
    """Write `splits.csv`: which patch trains, validates and tests, whoever decided it.

    Raises UserError where the run was begun with other patches or other splits.
    """
    before, now = _read_splits(folder), {row[0]: row[2] for row in _split_rows(patches)}
    if before and before != now:
        gone, new = len(before.keys() - now.keys()), len(now.keys() - before.keys())
        moved = sum(now.get(patch_id, split) != split for patch_id, split in before.items())
        raise UserError(
            f"{folder}: was begun with other patches ({new} are new, {gone} gone, {moved} in another split); "
            "choose another output, or bring back the data that it was begun with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "splits.csv", csv_text([["path", "label", "split", "group"], *_split_rows(patches)]))


def require_held_out(folder: Path, patches: Patches) -> None:
    """UserError where patches that a run trained with would now pass for held-out ones, or the reverse."""
    before = _read_splits(folder)
    moved = [row[0] for row in _split_rows(patches) if before.get(row[0], row[2]) != row[2]]
    if moved:
        raise UserError(
            f"{folder}: {len(moved)} patches stand in another split than when it was trained: {abbreviate(moved)}; "
            "files were added or removed since. Name splits in a manifest (splits.csv of the run has them) to keep them"
        )


def _split_rows(patches: Patches) -> Iterator[list[str]]:
    for i in np.flatnonzero(patches.splits < len(SPLITS)):
        label, split = patches.classes[patches.labels[i]], SPLITS[patches.splits[i]]
        yield [patches.ids[i], label, split, patches.group_names[patches.groups[i]]]


def _read_splits(folder: Path) -> dict[str, str]:
    path = folder / "splits.csv"
    return {row["path"]: row["split"] for row in csv_rows(path)} if path.exists() else {}


def last_values(folder: Path, prefix: str) -> dict[str, float]:
    """The newest logged value of every quantity whose name starts with `prefix`."""
    newest = {name: value for row in _logged(folder / "metrics.jsonl") for name, value in row.items()}
    return {name: value for name, value in newest.items() if name.startswith(prefix)}


class Log:
    """`metrics.jsonl` of a run, one JSON object a line with its step, and TensorBoard where it is asked for."""

    def __init__(self, folder: Path, *, from_step: int, tensorboard: bool):
        self._path = folder / "metrics.jsonl"
        if self._path.exists():  # what came after the checkpoint that is resumed will happen again
            kept = [json.dumps(row) + "\n" for row in _logged(self._path) if row["step"] <= from_step]
            replace_text(self._path, "".join(kept))
        self._board = _tensorboard(folder) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _logged(path: Path) -> Iterator[dict[str, float]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # of a line that a kill cut short
            yield json.loads(line)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        install = "pip install 'cellflux-bridge[tensorboard]'"
        raise UserError(f"train.tensorboard: tensorboard is not installed; run: {install}") from error
    return SummaryWriter(folder / "tensorboard")

"""What must not stand on both sides of a study: groups, near copies, and what a generator was trained on."""

from itertools import combinations, product
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.data.index import patch_index
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.near_copies import near_copies, thumbnail
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.study.pool import ready_patch
from cellflux_bridge.study.settings import StudyConfig

_TRAIN = SPLITS.index("train")


def require_no_leak(config: StudyConfig) -> tuple[StudyConfig, list[str]]:
    """The study as it is to be run, and what was looked for, a line each. UserError, with names, for a leak.

    No group may stand in two splits. Training patches that are near copies of validation or test patches of other
    groups are refused or, with near_copies=leave_out, their whole groups are left out for generators and classifiers
    alike; the splits stay as they are. Made images of a folder are compared with held-out patches, too.
    """
    patches, index = load_patches(config.data, seed=config.seed), patch_index(config.data, seed=config.seed)
    sides = {name: set(index.groups[index.splits == number].tolist()) for number, name in enumerate(SPLITS)}
    for one, other in combinations(SPLITS, 2):
        if both := sides[one] & sides[other]:
            names = [index.group_names[group].rpartition("\0")[2] for group in sorted(both)]
            raise UserError(f"{config.data.root}: groups in {one} and in {other}: {abbreviate(names)}")
    for split, label in product(SPLITS, index.classes):
        if not len(patches.indices(split, label)):
            raise UserError(f"data.split: no {split} patch of class {label!r}; a study needs training, val and test")
    thumbnails = np.stack([thumbnail(np.asarray(one)) for one in patches.pixels])
    pairs, likeness = near_copies(thumbnails, counts=lambda i, j: _across(patches, i, j))
    with_train = (patches.splits[pairs] == _TRAIN).any(1)
    lines = [
        f"groups in two splits: none; near copies of other groups: {with_train.sum()} pairs of training and held-out "
        f"patches, {(~with_train).sum()} of validation and test patches (these stay)"
    ]
    pairs, likeness = pairs[with_train], likeness[with_train]
    copies = {patches.group_names[patches.groups[i]] for i in pairs.ravel() if patches.splits[i] == _TRAIN}
    if copies and config.near_copies == "refuse":
        shown = [
            f"{patches.ids[i]} ~ {patches.ids[j]} (r = {r:.2f})" for (i, j), r in zip(pairs, likeness, strict=True)
        ]
        raise UserError(
            f"{config.data.root}: {len(pairs)} pairs of training patches and near copies of them in another split and "
            f"group: {abbreviate(shown, limit=5)}. Give copies one group in a manifest, or set near_copies=leave_out: "
            "then nothing trains on their groups"
        )
    for name, generator in config.generators.items():
        if generator.folder is not None:
            lines.append(_of_folder(name, generator.folder, patches, thumbnails))
    if copies:
        lines.append(f"left out of training, as near copies: {len(copies)} groups: {abbreviate(sorted(copies))}")
        kept = {patches.group_names[patches.groups[i]] for i in patches.indices("train")} - copies
        split = config.data.split.model_copy(update={"train_groups": sorted(kept)})
        config = config.model_copy(update={"data": config.data.model_copy(update={"split": split})})
    return config, lines


def _across(patches: Patches, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    one, other = patches.splits[i], patches.splits[j]
    known = (one < len(SPLITS)) & (other < len(SPLITS))  # what is in no split is on no side
    return known & (one != other) & (patches.groups[i] != patches.groups[j])


def _of_folder(name: str, folder: Path, patches: Patches, thumbnails: np.ndarray) -> str:
    files = image_files(folder)
    if not files:
        raise UserError(f"generators.{name}.folder={folder}: holds no image")
    made = [thumbnail(ready_patch(file, patches.preprocessing)) for file in files]
    held_out, num = np.concatenate([patches.indices("val"), patches.indices("test")]), len(made)
    both = np.concatenate([np.stack(made), thumbnails[held_out]])
    pairs, _ = near_copies(both, counts=lambda i, j: (i < num) != (j < num))
    if len(pairs):
        pairs = np.sort(pairs, axis=1)
        shown = [f"{files[i].relative_to(folder)} ~ {patches.ids[held_out[j - num]]}" for i, j in pairs]
        raise UserError(
            f"generators.{name}.folder={folder}: {len(shown)} of its images are nearly copies of held-out patches: "
            f"{abbreviate(shown, limit=5)}. It was made with them; remove them, or make it from training patches"
        )
    return f"generator {name}: no near copy of a held-out patch among {num} images; what made them is not known here"


def require_trained_on(run: Path, patches: Patches) -> None:
    """UserError where a generator's run trained on other patches than those of its size."""
    rows = {row["path"]: row["split"] for row in csv_rows(run / "splits.csv")}
    allowed = {patches.ids[i] for i in patches.indices("train")}
    if foreign := [path for path, split in rows.items() if split == "train" and path not in allowed]:
        raise UserError(f"{run}: trained on {len(foreign)} patches outside its size's groups: {abbreviate(foreign)}")

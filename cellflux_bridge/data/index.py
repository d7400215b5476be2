"""The patches that a configuration names, before any is decoded."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.config import registry
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import PatchRecord
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.data.split import assign_splits, check_groups


def list_records(config: DataConfig, *, seed: int) -> tuple[list[PatchRecord], tuple[str, ...]]:
    """The patches that a configuration names, every one with a split, and its classes.

    Raises UserError for a class that the data lacks or that the configuration does not know, for fewer than two
    classes, and for groups that stand in two splits.
    """
    records = registry.build("layout", config.layout, config.root.expanduser()).records()
    found = Counter(record.label for record in records)
    classes = tuple(config.classes if config.classes is not None else sorted(found))
    for label in classes:
        if label not in found:
            raise UserError(
                f"data.classes: no patch of class {label!r} in {config.root}{nearest(label, found)}; "
                f"found: {', '.join(sorted(found)) or 'none'}"
            )
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(
            f"{config.root}: label {abbreviate([repr(u) for u in unknown])} is not in data.classes; add it there, "
            "or to data.layout.ignore to leave it out"
        )
    if len(classes) < 2:
        raise UserError(f"{config.root}: only one class ({', '.join(classes) or 'none'}); a bridge needs two")
    check_groups(records, origin=str(config.root))
    return assign_splits(records, val=config.split.val, test=config.split.test, seed=seed), classes


def frame_mpp(records: Sequence[PatchRecord], preprocessing: Preprocessing) -> float | None:
    """Microns per pixel of patches at the network's scale: their median; None where the data does not tell them for
    every patch, or where they differ by more than 5 %."""
    if not records or any(record.mpp is None for record in records):
        return None
    sizes = [(0, 0)] * len(records)
    if preprocessing.crop is None:
        sizes = threaded(images.read_size, [record.file for record in records], desc="reading image sizes")
    found = [r.mpp / preprocessing.scale_of(*size) for r, size in zip(records, sizes, strict=True)]
    return float(np.median(found)) if max(found) <= 1.05 * min(found) else None


def taken_from_training(config: DataConfig, *, seed: int) -> str | None:
    """What to tell of patches that the data itself names `train` and that were taken for a split it does not name."""
    named = registry.build("layout", config.layout, config.root.expanduser()).records()
    assigned = assign_splits(named, val=config.split.val, test=config.split.test, seed=seed)
    of_train = [now.split for was, now in zip(named, assigned, strict=True) if was.split == "train"]
    taken = Counter(split for split in of_train if split != "train")
    if not taken:
        return None
    splits = " and ".join(f"{count} {split}" for split, count in taken.items())
    keys = " ".join(f"data.split.{split}=0" for split in taken)
    return (
        f"WARNING: the data names {len(of_train)} patches train and none {' or '.join(taken)}: of these {splits}; "
        f"name such a split, or set {keys} to train on all (judges need a test split)"
    )

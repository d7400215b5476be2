"""The patches that a configuration names, before any is decoded: listed once, kept as columns."""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.config import registry
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import SPLITS, PatchRecord
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.data.split import assign_splits, check_groups

_NUM_REMEMBERED = 16
_NUMBER_OF_SPLIT = {None: -1, **{name: number for number, name in enumerate(SPLITS)}}
_memory: dict[Hashable, Any] = {}
_lock = RLock()


def remembered(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returned for this key earlier in this process, or now; the oldest of more than 16 are forgotten."""
    with _lock:
        if key not in _memory:
            made = make()
            while len(_memory) >= _NUM_REMEMBERED:
                del _memory[next(iter(_memory))]
            _memory[key] = made
        return _memory[key]


@dataclass(frozen=True, eq=False)
class Index(Sequence[PatchRecord]):
    """N patches as columns, sorted by id; read as a sequence, it makes each PatchRecord on demand.

    `ids` are the records' ids, `files` their paths (relative to `root` where they lie under it); `labels` (N,) int64
    into `classes`; `splits` and `named` (N,) int64 into SPLITS, `named` being the data's own, -1 where it names none
    (`splits` has -1 only before splits are assigned); `groups` (N,) int64 into `group_names`, where a patch without a
    group has a name of its own that starts with a NUL; `scores` and `mpp` (N,) float64, NaN where not known.
    """

    root: Path
    ids: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    named: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    group_names: tuple[str, ...]
    scores: np.ndarray
    mpp: np.ndarray

    @classmethod
    def of(cls, root: Path, records: Sequence[PatchRecord]) -> "Index":
        """The columns of records whose classes are those that occur, in the order of the alphabet."""
        inside, ids = f"{root}{os.sep}", tuple(record.id for record in records)
        files = tuple(str(record.file).removeprefix(inside) for record in records)
        classes, labels = _numbered([record.label for record in records])
        named = np.array([_NUMBER_OF_SPLIT[record.split] for record in records], np.int64)
        group_names, groups = _numbered([f"\0{r.id}" if r.group is None else r.group for r in records])
        scores, mpp = (
            np.array([np.nan if v is None else v for v in column], np.float64)
            for column in ([record.score for record in records], [record.mpp for record in records])
        )
        files = ids if files == ids else files
        return cls(root, ids, files, labels, classes, named, named, groups, group_names, scores, mpp)

    def file(self, number: int) -> Path:
        return Path(self.root, self.files[number])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int | slice) -> PatchRecord | list[PatchRecord]:
        if isinstance(at, slice):
            return list(self)[at]
        at = range(len(self))[at]
        return next(self._records(slice(at, at + 1)))

    def __iter__(self) -> Iterator[PatchRecord]:
        return self._records(slice(None))

    def _records(self, part: slice) -> Iterator[PatchRecord]:
        columns = (self.labels, self.splits, self.groups, self.scores, self.mpp)
        rows = zip(self.ids[part], self.files[part], *(column[part].tolist() for column in columns), strict=True)
        for name, file, label, split, group, *numbers in rows:
            group, (score, mpp) = self.group_names[group], (None if v != v else v for v in numbers)
            split, group = None if split < 0 else SPLITS[split], None if group.startswith("\0") else group
            yield PatchRecord(name, Path(self.root, file), self.classes[label], split, group, score, mpp)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _numbered(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The different names, sorted, and the number of each name among them, (N,) int64."""
    different = tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(different)}
    return different, np.array([numbers[name] for name in names], np.int64)


def _stamp(root: Path) -> str:
    """A digest that changes where the listing of a root may change: of its manifest.csv and of the names, sizes and
    times of what lies beside it; without one, of every folder below it, its time and the names in it."""
    digest, manifest, seen = hashlib.sha256(), root / "manifest.csv", set()
    try:
        if manifest.exists():
            beside = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(root)]
            digest.update(repr(sorted((name, s.st_size, s.st_mtime_ns) for name, s in beside)).encode())
            digest.update(manifest.read_bytes())
            return digest.hexdigest()
        for folder, folders, files in os.walk(root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
                folders.clear()
            seen.add((status.st_dev, status.st_ino))
            digest.update(repr((folder, status.st_mtime_ns, sorted(folders), sorted(files))).encode())
    except OSError:
        pass  # the layout says what cannot be read
    return digest.hexdigest()


def patch_index(config: DataConfig, *, seed: int) -> Index:
    """The patches that a configuration names, every one with a split; its classes are the configuration's.

    A process lists them once, and anew where the manifest or the folders have changed; those of a layout of the user's
    own, which may read anything, every time. Raises UserError for a class that the data lacks or that the configuration
    does not know, for fewer than two classes, and for groups that stand in two splits.
    """
    root, fresh = config.root.expanduser(), []

    def listed() -> Index:
        fresh.extend(registry.build("layout", config.layout, root).records())
        return Index.of(root, fresh)

    def with_splits() -> Index:
        index = remember(key, listed)
        return _with_splits(index, fresh or list(index), config, seed=seed)

    remember = (lambda _, make: make()) if ":" in config.layout["name"] else remembered
    key = (str(root.absolute()), repr(config.layout), _stamp(root))
    settings = (tuple(config.classes or ()), config.split.val, config.split.test, seed)
    return remember((*key, *settings), with_splits)


def _with_splits(listed: Index, records: Sequence[PatchRecord], config: DataConfig, *, seed: int) -> Index:
    found = listed.classes
    classes = tuple(config.classes if config.classes is not None else found)
    for label in classes:
        if label not in found:
            raise UserError(
                f"data.classes: no patch of class {label!r} in {config.root}{nearest(label, found)}; "
                f"found: {', '.join(found) or 'none'}"
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
    assigned = assign_splits(records, val=config.split.val, test=config.split.test, seed=seed)
    splits = np.array([_NUMBER_OF_SPLIT[record.split] for record in assigned], np.int64)
    labels = np.array([classes.index(label) for label in found], np.int64)[listed.labels]
    return replace(listed, classes=classes, labels=labels, splits=splits)


def list_records(config: DataConfig, *, seed: int) -> tuple[Sequence[PatchRecord], tuple[str, ...]]:
    """The patches of `patch_index` as records, and their classes."""
    index = patch_index(config, seed=seed)
    return index, index.classes


def frame_mpp(records: Sequence[PatchRecord], preprocessing: Preprocessing) -> float | None:
    """Microns per pixel of patches at the network's scale: their median; None where the data does not name them for
    every patch, or where they differ by more than 5 %."""
    if not len(records) or any(record.mpp is None for record in records):
        return None
    sizes = [(0, 0)] * len(records)
    if preprocessing.crop is None:
        sizes = threaded(images.read_size, [record.file for record in records], desc="reading image sizes")
    found = [r.mpp / preprocessing.scale_of(*size) for r, size in zip(records, sizes, strict=True)]
    return float(np.median(found)) if max(found) <= 1.05 * min(found) else None


def taken_from_training(config: DataConfig, *, seed: int) -> str | None:
    """A warning where the data itself names patches `train` and some of them became a split that it does not name."""
    index = patch_index(config, seed=seed)
    of_train = index.splits[index.named == SPLITS.index("train")]
    taken = {
        name: n for name, n in zip(SPLITS, np.bincount(of_train, minlength=3), strict=True) if n and name != "train"
    }
    if not taken:
        return None
    splits = " and ".join(f"{count} {split}" for split, count in taken.items())
    keys = " ".join(f"data.split.{split}=0" for split in taken)
    return (
        f"WARNING: the data names {len(of_train)} patches train and none {' or '.join(taken)}: of these {splits}; "
        f"name such a split, or set {keys} to train on all (judges need a test split)"
    )

"""The patches that a configuration names, before any is decoded: listed once, kept as columns."""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import regular
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.config import registry
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import SPLITS, PatchRecord
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.data.split import assign_splits, check_groups

_SPLITS = (*SPLITS, None)
_MOST_BYTES = 1_000_000_000  # of a list of patches to leave out


_remembered: dict[Hashable, Any] = {}


def remembered(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returned for this key before, in this process, or returns now. Sixteen keys are remembered."""
    found = _remembered.pop(key, None)
    _remembered[key] = found = make() if found is None else found
    for oldest in list(_remembered)[:-16]:
        _remembered.pop(oldest, None)
    return found


@dataclass(frozen=True)
class Index:
    """N patches as columns, sorted by id.

    `ids` are the records' ids and `files` their paths, from `root` on where they lie below it; `labels` (N,) int64
    into `classes`; `splits` (N,) int64 into SPLITS, and `named` likewise, those that the data itself names; 3 means
    none, in `splits` of what data.split.train_groups leaves aside; `groups` (N,) int64 into `group_names`, of which
    those that start with a NUL stand for a patch without group; `scores`, `mpp` and `doses` (N,) float64, NaN where not
    known; `batches` (N,) int64 into `batch_names`, -1 for none; `reading` as `Layout.reading` says it.
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
    doses: np.ndarray
    batches: np.ndarray
    batch_names: tuple[str, ...]
    reading: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, records: Sequence[PatchRecord], reading: Sequence[str]) -> "Index":
        """The columns of records that may lack a split; the classes are those that occur, sorted."""
        ids = tuple(record.id for record in records)
        files = tuple(str(record.file).removeprefix(f"{root}{os.sep}") for record in records)
        labels, classes = _numbered([record.label for record in records])
        named = np.array([_SPLITS.index(record.split) for record in records], np.int64)
        groups = _numbered([f"\0{r.id}" if r.group is None else r.group for r in records])
        numbers = np.array([(r.score, r.mpp, r.dose) for r in records], np.float64).reshape(-1, 3).T  # None becomes NaN
        batches, batch_names = _numbered([r.batch or "" for r in records])  # "" is the first, where there is one
        if batch_names[:1] == ("",):
            batches, batch_names = batches - 1, batch_names[1:]
        files = ids if files == ids else files
        columns = (*groups, *numbers, batches, batch_names)
        return cls(root, ids, files, labels, classes, named, named, *columns, tuple(reading))

    def file(self, number: int) -> Path:
        return self.root / self.files[number]

    def records(self) -> list[PatchRecord]:
        """The patches as records, made anew."""
        groups = [None if name.startswith("\0") else name for name in self.group_names]
        columns = (self.labels, self.splits, self.groups, self.batches, self.scores, self.mpp, self.doses)
        rows = zip(self.ids, self.files, *(column.tolist() for column in columns), strict=True)
        batches = (*self.batch_names, None)
        return [
            PatchRecord(
                name,
                self.root / file,
                self.classes[c],
                _SPLITS[s],
                groups[g],
                *(n if n == n else None for n in (score, mpp)),
                batches[b],
                dose if dose == dose else None,
            )
            for name, file, c, s, g, b, score, mpp, dose in rows
        ]


def _numbered(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number (N,) int64 of each name among the different ones, and these, sorted."""
    different = tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(different)}
    return np.array([numbers[name] for name in names], np.int64), different


def _stamp(root: Path) -> str:
    """A digest of what a layout may read below its root: the names in every folder, the tables in the root, and the
    sizes and times of the CSV below."""
    digest, seen = hashlib.sha256(), set()
    with suppress(OSError):  # the layout says what cannot be read
        for folder, folders, files in os.walk(root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
                folders.clear()
            seen.add((status.st_dev, status.st_ino))
            digest.update(repr((folder, status.st_mtime_ns, sorted(folders), sorted(files))).encode())
            tables = [os.path.join(folder, file) for file in sorted(files) if file.endswith(".csv")]
            stats = [os.stat(table) for table in tables if os.path.exists(table)]
            digest.update(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
        for file in (*sorted(root.glob("*.csv")), *sorted(root.glob("*.json"))):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def left_out(config: DataConfig) -> tuple[str, ...]:
    """The ids in the file `data.without`, sorted."""
    if config.without is None:
        return ()
    try:
        file = regular(config.without.expanduser())
        if file.stat().st_size > _MOST_BYTES:
            raise OSError(f"more than {_MOST_BYTES:,} bytes")
        return tuple(sorted(set(file.read_text(encoding="utf-8-sig").split("\n")) - {""}))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.without: {config.without}: cannot be read as text ({error})") from error


def patch_index(config: DataConfig, *, seed: int) -> Index:
    """The patches that a configuration names, every one with a split; its classes are the configuration's.

    A process lists them once, and anew where tables or folders below the root have changed; a layout of the user's own,
    which may read anything, is always asked anew. Raises UserError for a class that the data lacks or that the
    configuration does not know, for fewer than two classes, and for groups that stand in two splits.
    """
    root, fresh, without = config.root.expanduser(), [], left_out(config)

    def listed() -> Index:
        layout = registry.build("layout", config.layout, root)
        records, omitted = layout.records(), set(without)
        if unknown := omitted - {record.id for record in records}:
            raise UserError(f"data.without: {config.without}: {abbreviate(sorted(unknown))}: no patch of {config.root}")
        fresh.extend(record for record in records if record.id not in omitted)
        return Index.of(root, fresh, layout.reading())

    if ":" in config.layout["name"]:
        return _with_splits(listed(), fresh, config, seed=seed)
    key = (str(root.absolute()), repr(config.layout), _stamp(root), without)
    index = remembered(key, listed)
    settings = (repr(config.classes), repr(config.batches), repr(config.split), seed)
    return remembered((*key, *settings), lambda: _with_splits(index, fresh or index.records(), config, seed=seed))


def _with_splits(listed: Index, records: Sequence[PatchRecord], config: DataConfig, *, seed: int) -> Index:
    found = listed.classes
    classes = tuple(config.classes if config.classes is not None else found)
    if missing := [label for label in classes if label not in found]:
        raise UserError(
            f"data.classes: no patch of class {missing[0]!r} in {config.root}{nearest(missing[0], found)}; "
            f"found: {', '.join(found) or 'none'}"
        )
    if unknown := [label for label in config.split.unseen if label not in found]:
        known = f"{nearest(unknown[0], found)}; known: {abbreviate(found, limit=10)}"
        raise UserError(f"data.split.unseen: no class {unknown[0]!r} in {config.root}{known}")
    if unknown := [repr(label) for label in found if label not in (*classes, *config.split.unseen)]:
        raise UserError(
            f"{config.root}: label {abbreviate(unknown)} is not in data.classes; add it there, or to "
            "data.layout.ignore to leave it out"
        )
    if len(classes) < 2:
        raise UserError(f"{config.root}: only one class ({', '.join(classes) or 'none'}); a bridge needs two")
    check_groups(records, origin=str(config.root))
    assigned = assign_splits(records, val=config.split.val, test=config.split.test, seed=seed)
    splits = np.array([_SPLITS.index(record.split) for record in assigned], np.int64)
    if config.split.train_groups is not None:
        names = [name.rpartition("\0")[2] for name in listed.group_names]
        in_training = {names[group] for group in np.unique(listed.groups[splits == SPLITS.index("train")])}
        if unknown := set(config.split.train_groups) - in_training:
            raise UserError(
                f"data.split.train_groups: {abbreviate(sorted(unknown))}: no training group of {config.root}; "
                "expected groups (patients, slides, tiles) of the train split"
            )
        kept = np.isin(names, config.split.train_groups)[listed.groups]
        splits[(splits == SPLITS.index("train")) & ~kept] = _SPLITS.index(None)
    number_of = {label: number for number, label in enumerate(classes)}
    labels = np.array([number_of.get(label, 0) for label in found], np.int64)[listed.labels]
    for label in config.split.unseen:
        splits[listed.labels == found.index(label)] = _SPLITS.index("test" if label in classes else None)
    # A batch that the configuration does not know is none: nothing was learned of it.
    batch_names = listed.batch_names if config.batches is None else tuple(config.batches)
    number_of = {name: number for number, name in enumerate(batch_names)}
    numbers = np.array([*(number_of.get(name, -1) for name in listed.batch_names), -1], np.int64)
    batches = {"batches": numbers[listed.batches], "batch_names": batch_names}
    return replace(listed, classes=classes, labels=labels, splits=splits, **batches)


def list_records(config: DataConfig, *, seed: int) -> tuple[list[PatchRecord], tuple[str, ...]]:
    """The patches of `patch_index` as records, and its classes."""
    index = patch_index(config, seed=seed)
    return index.records(), index.classes


def frame_mpp(records: Sequence[PatchRecord], preprocessing: Preprocessing) -> float | None:
    """Microns per pixel of patches at the network's scale: their median; None where the data does not name them for
    every patch, or where they differ by more than 5 %."""
    if not records or any(record.mpp is None for record in records):
        return None
    sizes = [(0, 0)] * len(records)
    if preprocessing.crop is None:
        sizes = threaded(preprocessing.read_size, [record.file for record in records], desc="reading image sizes")
    found = [r.mpp / preprocessing.scale_of(*size) for r, size in zip(records, sizes, strict=True)]
    return float(np.median(found)) if max(found) <= 1.05 * min(found) else None


def taken_from_training(index: Index) -> str | None:
    """A warning where the data itself names patches `train` and some of them became a split that it does not name."""
    of_train = index.splits[index.named == SPLITS.index("train")]
    taken = {name: (of_train == number).sum() for number, name in enumerate(SPLITS) if number in of_train and number}
    if not taken:
        return None
    splits = " and ".join(f"{count} {split}" for split, count in taken.items())
    keys = " ".join(f"data.split.{split}=0" for split in taken)
    return (
        f"WARNING: the data names {len(of_train)} patches train and none {' or '.join(taken)}: of these {splits}; "
        f"name such a split, or set {keys} to train on all (judges need a test split)"
    )

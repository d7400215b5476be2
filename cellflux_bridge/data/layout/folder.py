"""A folder of patches: `manifest.csv`, or `<split>/<class>/*`, or `<class>/*`, whichever is there."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.data.layout.base import SPLITS, Layout, PatchRecord
from cellflux_bridge.images import SUFFIXES

_SPLIT_NAMES = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val"}
_COLUMNS = {"path", "label", "split", "group", "score", "mpp"}


class Folder(Layout):
    """Lists the patches under a root.

    With a `manifest.csv` its rows are the patches: columns path (relative to the root) and label, optionally split
    (train, val, test), group, score in [0, 1] and mpp (microns per pixel of the file); other columns are ignored.
    Without one, the root's folders are the splits or the classes; a folder inside a class folder is a group (one
    patient's or slide's patches), the same one wherever its name stands again.
    `ignore` names classes that are there and are to be left out.
    """

    def __init__(self, root: Path, *, ignore: list[str] = []):  # noqa: B006 -- read only
        self.root, self.ignore = root, ignore

    def records(self) -> list[PatchRecord]:
        """Every patch of every class that is not ignored, sorted by id."""
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; set data.root to the folder that holds the patches")
        manifest = self.root / "manifest.csv"
        found = list(self._from_manifest(manifest) if manifest.exists() else self._from_folders())
        return sorted((r for r in found if r.label not in self.ignore), key=lambda record: record.id)

    def _from_folders(self) -> Iterator[PatchRecord]:
        folders = [folder for folder in _subfolders(self.root) if folder.name not in self.ignore]
        splits = [folder.name for folder in folders if folder.name in _SPLIT_NAMES]
        if splits and len(splits) < len(folders):
            others = [repr(folder.name) for folder in folders if folder.name not in _SPLIT_NAMES]
            raise UserError(
                f"{self.root}: the split folders {', '.join(splits)} stand beside {abbreviate(others)}, so that these "
                "may be splits or classes; list what is no split in data.layout.ignore, or name the patches in a "
                "manifest.csv"
            )
        if splits:
            for folder in folders:
                yield from self._classes(_subfolders(folder), split=_SPLIT_NAMES[folder.name])
        else:
            yield from self._classes(folders, split=None)

    def _classes(self, folders: Sequence[Path], *, split: str | None) -> Iterator[PatchRecord]:
        for folder in folders:
            if folder.name in self.ignore:
                continue
            empty = True
            for file in _image_files(folder):
                empty = False
                inside = file.relative_to(folder).parts[:-1]
                group = "/".join(inside) or None
                yield PatchRecord(file.relative_to(self.root).as_posix(), file, folder.name, split, group)
            if empty:
                raise UserError(
                    f"{folder}: holds no image ({', '.join(SUFFIXES)}); fill it, remove it, or list "
                    f"{folder.name!r} in data.layout.ignore"
                )

    def _from_manifest(self, manifest: Path) -> Iterator[PatchRecord]:
        absent, seen = [], {}
        for number, row in _read_rows(manifest):
            record = self._row(row, where=f"{manifest}, line {number}")
            if record.id in seen:
                raise UserError(f"{manifest}, line {number}: {record.id} stands already on line {seen[record.id]}")
            seen[record.id] = number
            if not record.file.is_file():
                absent.append(record.id)
            yield record
        if absent:
            raise UserError(f"{manifest}: {len(absent)} listed files do not exist: {abbreviate(absent)}")

    def _row(self, row: dict[str, str | None], *, where: str) -> PatchRecord:
        values = {key: (row.get(key) or "").strip() or None for key in _COLUMNS}
        path, label, split = values["path"], values["label"], values["split"]
        if path is None or label is None:
            raise UserError(f"{where}: path and label must not be empty")
        relative = Path(os.path.normpath(path.replace("\\", "/")))
        if relative.is_absolute() or relative.parts[:1] in ((), ("..",)):
            raise UserError(
                f"{where}: {path} names no file inside {self.root}; paths are relative to the manifest's folder"
            )
        if split is not None and split not in _SPLIT_NAMES:
            raise UserError(f"{where}: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        score = _number(values["score"], where=f"{where}, score", low=0, high=1)
        mpp = _number(values["mpp"], where=f"{where}, mpp", low=0.001, high=1000)
        return PatchRecord(
            relative.as_posix(), self.root / relative, label, _SPLIT_NAMES.get(split), values["group"], score, mpp
        )


def _read_rows(manifest: Path) -> list[tuple[int, dict[str, str | None]]]:
    """The rows of a manifest, each with the line that it ends on."""
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"path", "label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{manifest}: no column {' or '.join(sorted(missing))}; known: {sorted(_COLUMNS)}")
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest}: cannot be read as CSV in UTF-8 ({error})") from error


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _number(text: str | None, *, where: str, low: float, high: float) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no number") from error
    if not low <= value <= high:
        raise UserError(f"{where}: {value} is outside [{low}, {high}]")
    return value

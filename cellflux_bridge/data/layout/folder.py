"""A folder of patches: `manifest.csv`, or folders that are named like splits and classes, whichever is there."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.walk import is_hidden, subfolders, suffix_counts, walk
from cellflux_bridge.data.layout.base import Layout, PatchRecord, in_order, split_of
from cellflux_bridge.data.layout.manifest import Manifest
from cellflux_bridge.images import SUFFIXES

_WAY_OUT = "list folders that hold no patches in data.layout.ignore, or name path, label and split in a manifest.csv"


class Folder(Layout):
    """Lists the patches under a root.

    With a `manifest.csv` its rows are the patches (see `Manifest`). Without one the tree is read as
    root/<class>/..., root/<split>/<class>/... or root/<class>/<split>/...; the first folder below these is a group
    (one patient's or slide's patches), however deep its files lie, and the same group wherever its name stands again.
    A tree that mixes these forms is refused. `ignore` names classes that are there and are to be left out.
    `follow_links` lets a manifest name files that lie outside of the root behind symbolic links.
    """

    def __init__(self, root: Path, *, ignore: list[str] = [], follow_links: bool = False):  # noqa: B006 -- read only
        self.root, self.ignore, self._follow_links = root, ignore, follow_links
        self._reading: list[str] = []

    def records(self) -> list[PatchRecord]:
        """Every patch of every class that is not ignored, sorted by id."""
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; set data.root to the folder that holds the patches")
        if (self.root / "manifest.csv").exists():
            manifest = Manifest(self.root, ignore=self.ignore, follow_links=self._follow_links)
            records, self._reading = manifest.records(), manifest.reading()
            return records
        form, homes = self._read_tree()
        others: Counter[str] = Counter()
        records = in_order((r for home in homes for r in self._patches(*home, others)), ignore=())
        self._reading = [self._summary(form, records)]
        groups = {record.group for record in records if record.group is not None}
        if groups and len(groups) <= len({label for _, label, _ in homes}):
            self._reading.append(
                f"WARNING: no more groups ({abbreviate(sorted(groups))}) than classes: if these folders are no "
                "patients or slides, name label and group of the patches in a manifest.csv"
            )
        if loose := _images_in(self.root):
            self._reading.append(
                f"WARNING: {len(loose)} images lie beside the folders, belong to no class and are left out: "
                f"{abbreviate(loose, limit=2)}"
            )
        if others:
            self._reading.append(
                f"WARNING: image files that are not read: {abbreviate([f'{n} {what}' for what, n in others.items()])}; "
                "convert them to PNG or TIFF, or remove them"
            )
        return records

    def reading(self) -> list[str]:
        return self._reading

    def _summary(self, form: str, records: Sequence[PatchRecord]) -> str:
        groups = {record.group for record in records if record.group is not None}
        alone = sum(record.group is None for record in records)
        text = f"read as {form}{'/<group>/...' if groups else '/*'}: {len({r.label for r in records})} classes"
        if groups:
            text += f", {len(groups)} groups named by the folder below the class"
            text += f", {alone} patches outside of such folders, each alone" if alone else ""
        return text

    def _read_tree(self) -> tuple[str, list[tuple[Path, str, str | None]]]:
        """The form of the tree, and the folders that hold one class's patches, each with its label and split."""
        tops = [folder for folder in subfolders(self.root) if folder.name not in self.ignore]
        if not tops and (loose := _images_in(self.root)):
            raise UserError(
                f"{self.root}: holds {len(loose)} images and no folder for each class: expected root/<class>/*; if "
                f"this folder is one class of several, set data.root={self.root.parent}"
            )
        splits = _splits(tops, where=self.root)
        if splits:
            return self._splits_of_classes(splits)
        self._refuse_wrapping(tops)
        inside = {top: _splits(subfolders(top), where=top) for top in tops}
        split = [top for top in tops if inside[top]]
        if split and (len(split) < len(tops) or any(map(_images_in, split))):
            others = [top.name for top in tops if not inside[top] or _images_in(top)]
            raise UserError(
                f"{self.root}: read as root/<class>/<split>/..., since {split[0]} holds the split folders "
                f"{', '.join(f.name for f in inside[split[0]])}; but in {abbreviate(others)} images lie outside of "
                f"split folders; {_WAY_OUT}"
            )
        if split:
            homes = [(folder, top.name, name) for top in tops for folder, name in inside[top].items()]
            names = sorted({f"{folder.name} = {name}" for folder, _, name in homes})
            return f"root/<class>/<split> ({', '.join(names)})", homes
        return "root/<class>", [(top, top.name, None) for top in tops]

    def _splits_of_classes(self, splits: dict[Path, str]) -> tuple[str, list[tuple[Path, str, str | None]]]:
        homes, classes = [], []
        for folder, split in splits.items():
            labels = [sub for sub in subfolders(folder) if sub.name not in self.ignore]
            if not labels or _images_in(folder):
                raise UserError(
                    f"{folder}: read as root/<split>/<class>/*, but it holds "
                    f"{'images that lie in no class folder' if _images_in(folder) else 'no class folder'}; {_WAY_OUT}"
                )
            homes += [(sub, sub.name, split) for sub in labels]
            classes.append({sub.name for sub in labels})
        if not set.intersection(*classes):
            raise UserError(
                f"{self.root}: read as root/<split>/<class>/*, but no class stands in all of "
                f"{', '.join(folder.name for folder in splits)}: are the folders below them patients? {_WAY_OUT}"
            )
        return f"root/<split> ({', '.join(f'{f.name} = {split}' for f, split in splits.items())})/<class>", homes

    def _refuse_wrapping(self, tops: Sequence[Path]) -> None:
        """UserError where the root holds one folder only, and that one holds the folders to read."""
        if len(tops) != 1 or _images_in(tops[0]):
            return
        inner, below = tops[0], subfolders(tops[0])
        while len(below) == 1 and not _images_in(below[0]) and split_of(below[0].name) is None:
            inner, below = below[0], subfolders(below[0])
        if len(below) > 1 or any(split_of(folder.name) for folder in below):
            raise UserError(
                f"{self.root}: read as root/<class>/..., but it holds one folder only, {tops[0].name}, and only one "
                f"class cannot become another; if {abbreviate([f.name for f in below])} are the classes or splits, "
                f"set data.root={inner}"
            )

    def _patches(self, folder: Path, label: str, split: str | None, others: Counter) -> Iterator[PatchRecord]:
        prefix, start = folder.relative_to(self.root).as_posix(), len(str(folder)) + 1
        known: set[str] = set()
        left_out, empty = [], True
        for file in walk(folder):
            if not file.name.lower().endswith(SUFFIXES):
                left_out.append(file)
                continue
            empty = False
            name = str(file)[start:].replace(os.sep, "/")
            parent = name.rpartition("/")[0]
            if parent not in known:
                known.add(parent)
                for part in filter(split_of, parent.split("/")):
                    raise UserError(
                        f"{file.parent}: {part!r} names a split, but stands below {folder}, whose folders are read as "
                        f"groups; {_WAY_OUT}"
                    )
            yield PatchRecord(f"{prefix}/{name}", file, label, split, parent.partition("/")[0] or None)
        if empty:
            found = f" that is read, but {suffix_counts(left_out)}" if left_out else ""
            raise UserError(
                f"{folder}: holds no image ({', '.join(SUFFIXES)}){found}; fill it, remove it, or list "
                f"{folder.name!r} in data.layout.ignore"
            )
        others.update(f"{file.suffix.lower()} in class {label}" for file in left_out)


def _splits(folders: Sequence[Path], *, where: Path) -> dict[Path, str]:
    """The split that each folder names, or nothing where none of them does; UserError where only some do."""
    found = {folder: split for folder in folders if (split := split_of(folder.name)) is not None}
    if found and len(found) < len(folders):
        others = [repr(folder.name) for folder in folders if folder not in found]
        raise UserError(
            f"{where}: the split folders {', '.join(f.name for f in found)} stand beside {abbreviate(others)}, so that "
            f"these may be splits or something else; {_WAY_OUT}"
        )
    return found


def _images_in(folder: Path) -> list[str]:
    """The names of the images that lie in a folder itself."""
    names = (path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir())
    return sorted(name for name in names if not is_hidden(name))

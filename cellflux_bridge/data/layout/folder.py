"""A folder of patches: `manifest.csv`, or folders that are named like splits and classes, whichever is there."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.walk import is_hidden, is_image, subfolders, walk
from cellflux_bridge.data.layout.base import PatchRecord, in_order, split_of
from cellflux_bridge.data.layout.manifest import Manifest
from cellflux_bridge.images import SUFFIXES

_MANIFESTS = r"manifest\.(csv|tsv|txt|xlsx?|ods)"
_WAY_OUT = "list folders that hold no patches in data.layout.ignore, or name path, label and split in a manifest.csv"


class Folder(Manifest):
    """Lists the patches under a root: the rows of its `manifest.csv` where there is one (see `Manifest`).

    Without one the tree is read as root/<class>/..., root/<split>/<class>/... or root/<class>/<split>/...; the first
    folder below these is a group (one patient's or slide's patches), however deep its files lie, and the same group
    wherever its name stands again. A tree that mixes these forms is refused.
    """

    def records(self) -> list[PatchRecord]:
        """Every patch of every class that is not ignored, sorted by id."""
        if not self.root.is_dir():
            fault = "is a file" if self.root.exists() else "no such folder"
            raise UserError(f"{self.root}: {fault}; set data.root to the folder that holds the patches")
        if (self.root / "manifest.csv").exists():
            return super().records()
        if near := [path.name for path in self.root.iterdir() if re.fullmatch(_MANIFESTS, path.name.casefold())]:
            raise UserError(f"{self.root / near[0]}: is not read; save it as manifest.csv, in CSV, or rename it")
        form, homes = self._read_tree()
        others: Counter[str] = Counter()
        records = in_order((r for home in homes for r in self._patches(*home, others)), ignore=())
        alone, groups = sum(r.group is None for r in records), {r.group for r in records} - {None}
        reading = f"read as {form}/{'<group>/...' if groups else '*'}: {len({r.label for r in records})} classes"
        if groups:
            reading += f", {len(groups)} groups named by the folder below the class, {alone} patches in none"
        self._reading = [reading]
        if loose := _images_in(self.root):
            others["images beside the class folders"] = len(loose)
        if others:
            left_out = abbreviate([f"{number} {what}" for what, number in others.items()], limit=20)
            self._reading.append(f"WARNING: left out: {left_out}; PNG, JPEG and TIFF files in class folders are read")
        return records

    def _read_tree(self) -> tuple[str, list[tuple[Path, str, str | None]]]:
        """The form of the tree, and the folders that hold one class's patches, each with its label and split."""
        tops = [top for top in subfolders(self.root) if top.name not in self.ignore]
        inside = {top: [sub for sub in subfolders(top) if sub.name not in self.ignore] for top in tops}
        if not tops and (loose := _images_in(self.root)):
            raise UserError(
                f"{self.root}: holds {len(loose)} images and no folder for each class: expected root/<class>/*; if "
                f"this folder is one class of several, set data.root={self.root.parent}"
            )
        if folds := [top.name for top in tops if re.fullmatch(r"(fold|cv)[\W_]*\d+", top.name.casefold())]:
            raise UserError(f"{self.root}: {abbreviate(folds)} would be classes, but are called like folds; {_WAY_OUT}")
        splits = _splits(tops, where=self.root)
        if not splits and len(tops) == 1 and inside[tops[0]] and not _images_in(tops[0]):
            raise UserError(
                f"{self.root}: read as root/<class>/..., but it holds one folder only, {tops[0].name}, so only one "
                f"class; if {abbreviate([sub.name for sub in inside[tops[0]]])} are the classes or splits, set "
                f"data.root={tops[0]}"
            )
        below = {} if splits else _splits([sub for subs in inside.values() for sub in subs], where=self.root)
        if not splits and not below:
            return "root/<class>", [(top, top.name, None) for top in tops]
        form = "root/<split>/<class>" if splits else "root/<class>/<split>"
        for top, subs in inside.items():
            if not subs or _images_in(top):
                fault = "images beside its folders" if subs else "no such folder"
                raise UserError(f"{top}: read as {form}/..., but it holds {fault}; {_WAY_OUT}")
        names = sorted({f"{folder.name} = {split}" for folder, split in (splits or below).items()})
        pairs = [(top, sub) for top, subs in inside.items() for sub in subs]
        homes = [(sub, sub.name, splits[top]) if splits else (sub, top.name, below[sub]) for top, sub in pairs]
        return f"{form} ({', '.join(names)})", homes

    def _patches(self, folder: Path, label: str, split: str | None, others: Counter[str]) -> Iterator[PatchRecord]:
        """The patches of a class folder; other image files are counted in `others`."""
        prefix, start, known = folder.relative_to(self.root).as_posix(), len(str(folder)) + 1, set()
        left_out: Counter[str] = Counter()
        for file in walk(folder):
            if not is_image(file):
                left_out[file.suffix.lower()] += 1
                continue
            name = str(file)[start:].replace(os.sep, "/")
            parent = name.rpartition("/")[0]
            if parent not in known and any(map(split_of, parent.split("/"))):
                raise UserError(f"{file.parent}: names a split, but is read as a group below {folder}; {_WAY_OUT}")
            known.add(parent)
            yield PatchRecord(f"{prefix}/{name}", file, label, split, parent.partition("/")[0] or None)
        if not known:
            found = f", but {', '.join(f'{n} {suffix}' for suffix, n in left_out.items())}" if left_out else ""
            raise UserError(
                f"{folder}: holds no image ({', '.join(SUFFIXES)}){found}; fill it, remove it, or list "
                f"{folder.name!r} in data.layout.ignore"
            )
        for suffix, number in left_out.items():
            others[f"{suffix} of class {label}"] += number


def _splits(folders: Sequence[Path], *, where: Path) -> dict[Path, str]:
    """The split that each folder names, or nothing where none of them does; UserError where only some do."""
    found = {folder: split for folder in folders if (split := split_of(folder.name)) is not None}
    if found and len(found) < len(folders):
        names, others = (sorted({f.name for f in folders if (f in found) == named}) for named in (True, False))
        raise UserError(
            f"{where}: the split folders {abbreviate(names)} stand beside {abbreviate(others)}, so that these may be "
            f"splits or something else; {_WAY_OUT}"
        )
    return found


def _images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself."""
    return [path for path in folder.iterdir() if is_image(path) and not is_hidden(path.name) and not path.is_dir()]

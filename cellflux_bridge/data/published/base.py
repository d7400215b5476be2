"""What every published data set has, and the way from its download to a manifest.csv.

An entry reads a `Download` and yields a `Patch` for every image. All else happens here: paths are checked, numbers are
compared with the published ones, images are linked or written, and the manifest is written last and read again.
"""

import filecmp
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_rows, csv_text, mapped, regular, replace_text, replacing
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.base.walk import is_image, subfolders, walk
from cellflux_bridge.data.layout.base import split_of
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.layout.manifest import COLUMNS
from cellflux_bridge.images import write_png

_WRITERS = 4


class Patch(NamedTuple):
    """A row of the manifest. `path` is relative to the download, or to OUT where `write` makes the file; `where` is the
    line or item that names the patch, for errors."""

    path: str
    label: str
    split: str | None = None
    group: str | None = None
    score: float | None = None
    mpp: float | None = None
    where: str = ""
    write: Callable[[Path], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """An entry. `counts` are the published numbers of images: of "all", a split, a class, or "split/class".

    `classes` are the labels that there may be, any where it is empty. `groups` and `scores` say what becomes of these
    columns, `table` which columns a CSV of --table must have. `unconfirmed` says what could not be confirmed from the
    publishers' own pages, and `note` what a user must know beside it; both are printed.
    """

    title: str
    source: str
    licence: str
    citation: str
    tree: str
    read: Callable[["Download"], Iterable[Patch]]
    counts: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    groups: str = "none published"
    scores: str = "none"
    table: tuple[str, ...] = ()
    note: str = ""
    unconfirmed: str = ""


class Download:
    """A data set as it was unpacked. Whatever is not there is a UserError that draws the expected tree."""

    def __init__(self, entry: Published, root: Path, table: Path | None = None):
        self.entry, self.root, self._table = entry, root, table
        if not root.is_dir():
            self.fail("is a file" if root.exists() else "no such folder")

    @cached_property
    def _real_root(self) -> str:
        return os.path.join(os.path.realpath(self.root), "")

    def fail(self, fault: str) -> None:
        """UserError with the fault, what the folder holds, the expected tree, and where to get the data."""
        found = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        raise UserError(
            f"{self.root}: {fault}\nfound: {abbreviate(found, limit=12) or 'nothing'}\nexpected:\n{self.entry.tree}\n"
            f"from: {self.entry.source}"
        )

    def file(self, name: str, *, where: str = "") -> Path:
        """A file of the download by its relative path. UserError for one that is missing or lies elsewhere."""
        found = self.root / _inside(name, where=where or self.root)
        if not found.is_file():
            self.fail(f"{where}: {name}: no such file" if where else f"{name}: no such file")
        if not os.path.realpath(found).startswith(self._real_root):
            raise UserError(f"{found}: leads outside of {self.root} by a symbolic link; put the file itself there")
        return found

    def images(self, folder: str) -> list[str]:
        """Relative paths of the images at any depth below a folder, sorted."""
        if not (self.root / folder).is_dir():
            self.fail(f"{folder}: no such folder")
        found = sorted(path.relative_to(self.root).as_posix() for path in walk(self.root / folder) if is_image(path))
        return found or self.fail(f"{folder}: holds no image")

    def folders(self, folder: str = ".") -> list[str]:
        """Names of the folders inside a folder, sorted."""
        if not (self.root / folder).is_dir():
            self.fail(f"{folder}: no such folder")
        return [path.name for path in subfolders(self.root / folder)]

    def class_folders(self, folder: str, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Path and label of every image below the folders that `labels` names; other folders are refused."""
        if others := sorted(set(self.folders(folder)) - set(labels)):
            self.fail(f"{folder}: holds folders that are no class: {abbreviate(others)}; move them elsewhere")
        return ((path, label) for name, label in labels.items() for path in self.images(f"{folder}/{name}"))

    def rows(self, name: str | Path, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Where each row of a CSV stands, and its cells by column. UserError for a damaged file or a missing column."""
        file = self.file(name) if isinstance(name, str) else name
        try:
            for number, row in enumerate(csv_rows(file), 2):
                cells = {column.strip("\ufeff "): cell.strip() for column, cell in row.items()}
                if missing := [column for column in columns if column not in cells]:
                    raise UserError(f"{file}: no column {missing[0]!r}; found: {abbreviate(list(cells), limit=10)}")
                yield f"{file}, row {number}", cells
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error

    def table(self) -> list[tuple[str, dict[str, str]]]:
        """The rows of the user's own CSV, --table."""
        if self._table is None:
            raise UserError(f"--table: name a CSV with the columns {', '.join(self.entry.table)}. {self.entry.note}")
        return list(self.rows(self._table, *self.entry.table))

    def items(self, name: str, /, **types: type) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each item of a JSON list stands, and its values; every item must have these keys of these types."""
        file = self.file(name)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read as JSON ({error}); unpack the download again") from error
        if not isinstance(found, list):
            raise UserError(f"{file}: holds {type(found).__name__}, expected a list; unpack the download again")
        for number, item in enumerate(found):
            where = f"{file}, item {number}"
            if not isinstance(item, dict) or any(type(item.get(key)) is not kind for key, kind in types.items()):
                expected = ", ".join(f"{key} ({kind.__name__})" for key, kind in types.items())
                raise UserError(f"{where}: {str(item)[:80]}; expected {expected}")
            yield where, item

    def npy(self, name: str) -> np.ndarray:
        """A memory-mapped NumPy array; nothing is unpickled."""
        file = self.file(name)
        try:
            return mapped(file)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: damaged, or no plain NumPy array ({error}); unpack the download again") from error

    def hdf5(self, name: str, key: str, *, without: str = "") -> Any:
        """A data set of an HDF5 file that lies in that file itself; `without` says what to do where there is none."""
        file = self.file(name)
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"{file}: HDF5 needs h5py: pip install 'cellflux-bridge[data]'") from error
        try:
            opened = h5py.File(regular(file), "r")
            link = opened.get(key, getlink=True)
            found = opened[key] if isinstance(link, h5py.HardLink) else None
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: damaged, or no HDF5 file ({error}); unpack the download again") from error
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise UserError(
                f"{file}: holds no array {key!r}; found: {', '.join(opened) or 'nothing'}. {without}".strip()
            )
        return found


def number(text: str, *, where: str, high: float) -> float:
    """A number from 0 to `high`."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= high:
        raise UserError(f"{where}: {text!r}; expected a number from 0 to {high:g}")
    return value


def match(pattern: Any, name: str, *, expected: str) -> Any:
    """The match of a file's name; UserError that says what was expected."""
    if found := pattern.search(name):
        return found
    raise UserError(f"{name}: this name says too little; expected {expected}, as published")


def require_stack(stack: Any, *, name: str, length: int | None = None) -> Any:
    """The images (N, H, W, 3) themselves; UserError for another shape or number."""
    if len(stack.shape) != 4 or stack.shape[3] != 3 or stack.dtype.kind not in "uif":
        raise UserError(f"{name}: {stack.dtype} of shape {stack.shape}; expected images (N, H, W, 3)")
    if length is not None and len(stack) != length:
        raise UserError(f"{name}: {len(stack)} images, but {length} labels; unpack the download again")
    return stack


def write_image(stack: Any, index: int, name: str, path: Path) -> None:
    """Write one image (H, W, 3) of a stack, of values 0 to 255, as PNG."""
    values = np.asarray(stack[index])
    if not (values.min() >= 0 and values.max() <= 255):
        raise UserError(f"{name}, image {index}: values {values.min()} to {values.max()}; expected 0 to 255")
    write_png(path, np.ascontiguousarray(values.round().astype(np.uint8)))


def prepare(
    entry: Published,
    source: Path,
    out: Path,
    *,
    table: Path | None = None,
    other_counts: bool = False,
    published_split: bool = False,
) -> list[str]:
    """Write `out`/manifest.csv, and the images that it names, for the download in `source`; what to tell the user.

    Images that are files stay where they are if `out` is the download's own folder. Otherwise they are linked (hard
    links take no room), or copied where the disk has no such links. UserError, before anything is written, for another
    tree or other numbers than the published ones, unless `other_counts`. Where a group stands in several of the
    published splits these are left out, since figures on them are leaked; `published_split` leaves out the groups.
    """
    if (out / "manifest.csv").exists():
        raise UserError(f"{out / 'manifest.csv'}: is there already; remove it, or choose another folder")
    download = Download(entry, source, table)
    patches = [_checked(patch, download) for patch in entry.read(download)]
    if not patches:
        download.fail("holds no images")
    lines = _compare(patches, entry.counts)
    if lines and not other_counts:
        raise UserError(
            f"{source}: not as many images as were published:\n  " + "\n  ".join(lines) + "\nUnpack the download "
            "again, or pass --allow-other-counts for a part of it or for a later version"
        )
    patches, leaks = _without_leaks(patches, published_split=published_split)
    out.mkdir(parents=True, exist_ok=True)
    at_home = out.samefile(source)
    for folder in {(out / patch.path).parent for patch in patches if patch.write or not at_home}:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.join(os.path.realpath(folder), "").startswith(os.path.join(os.path.realpath(out), "")):
            raise UserError(f"{folder}: leads outside of {out} by a symbolic link; choose another folder")

    def place(patch: Patch) -> None:
        if patch.write:
            patch.write(out / patch.path)
        elif not at_home:
            _link(source / patch.path, out / patch.path)

    threaded(place, patches, workers=_WRITERS, desc="images")
    columns = [name for name in COLUMNS if name in Patch._fields]
    rows = [[getattr(patch, name) for name in columns] for patch in sorted(patches, key=attrgetter("path"))]
    replace_text(out / "manifest.csv", csv_text([columns, *rows]))
    try:
        Folder(out).records()
    except UserError:
        (out / "manifest.csv").unlink()
        raise
    labels = Counter(patch.label for patch in patches)
    summary = ", ".join(f"{number} {label}" for label, number in sorted(labels.items()))
    return [
        f"{out / 'manifest.csv'}: {len(patches)} patches ({summary}); read it with data.root={out}",
        *(f"WARNING: {line}" for line in lines + leaks),
        f"groups: {entry.groups}; scores: {entry.scores}",
        f"licence: {entry.licence}; cite {entry.citation}",
        *([f"note: {entry.note}"] if entry.note else []),
        *([f"NOT CONFIRMED: {entry.unconfirmed}"] if entry.unconfirmed else []),
    ]


def _inside(name: str, *, where: object) -> str:
    """A relative path, as it is; UserError for one that leads out of its folder."""
    path = PureWindowsPath(name)  # divides at / and \ alike
    if path.drive or path.root or ".." in path.parts or not path.parts or "\0" in name:
        raise UserError(f"{where}: {name!r} names no file inside the folder; remove it")
    return path.as_posix()


def _checked(patch: Patch, download: Download) -> Patch:
    """A patch whose path, label and split are what they may be."""
    where = patch.where or f"{download.root / patch.path}"
    classes = download.entry.classes
    if not patch.label or (classes and patch.label not in classes):
        raise UserError(
            f"{where}: label {patch.label!r}; expected {'one of ' * bool(classes)}{', '.join(classes) or 'one'}"
        )
    if patch.split is not None and split_of(patch.split) is None:
        raise UserError(f"{where}: split {patch.split!r}; expected train, val or test")
    path = _inside(patch.path, where=where)
    if patch.write is None:
        download.file(path, where=patch.where)
    return patch._replace(path=path, split=patch.split and split_of(patch.split))


def _compare(patches: list[Patch], counts: Mapping[str, int]) -> list[str]:
    """A line for every published number that differs from what was found."""
    found = Counter()
    for patch in patches:
        found.update({"all", patch.label, *([patch.split, f"{patch.split}/{patch.label}"] if patch.split else [])})
    return [f"{key}: found {found[key]}, published {num}" for key, num in counts.items() if found[key] != num]


def _without_leaks(patches: list[Patch], *, published_split: bool) -> tuple[list[Patch], list[str]]:
    """Patches whose groups stand in one split each, and what had to be left out for it."""
    splits = defaultdict(set)
    for patch in patches:
        splits[patch.group].add(patch.split)
    leaks = sorted(group for group, found in splits.items() if group is not None and len(found) > 1)
    if not leaks:
        return patches, []
    fault = (
        f"{len(leaks)} groups stand in more than one published split ({abbreviate(leaks)}): figures on it are leaked"
    )
    if published_split:
        kept = [patch._replace(group=None) for patch in patches]
        return kept, [f"{fault}; its groups were left out (--published-split)"]
    kept = [patch._replace(split=None) for patch in patches]
    return kept, [f"{fault}. The split was left out, so that groups are split anew; --published-split keeps it"]


def _link(source: Path, target: Path) -> None:
    """Make `target` the file `source` by a hard link, or a copy of it."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except FileExistsError as error:
        if not filecmp.cmp(real, target, shallow=False):
            raise UserError(f"{target}: is another file; choose an empty folder") from error
    except OSError:  # another disk, or one without hard links
        with replacing(target) as temporary:
            shutil.copyfile(real, temporary)

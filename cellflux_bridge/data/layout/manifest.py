"""A table of patches: `manifest.csv` under the root."""

import csv
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import regular
from cellflux_bridge.base.walk import is_hidden
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.layout.base import SPLITS, Layout, PatchRecord, in_order, split_of

COLUMNS = ("path", "label", "split", "group", "score", "mpp", "batch", "dose")
# What R, pandas, Excel and people write where a value is not known.
_ABSENT = {"", *"na n/a n.a. #n/a <na> nan none null nil (null) - -- ? missing unknown".split()}
_NO_NUMBER = _ABSENT - {"nan"}  # nan is a calculation that failed
_OUTSIDE = re.compile(r"/|\.\.(/|$)|\.$|[A-Za-z]:|.*\0", re.DOTALL)
_MAX_CELL = 4096


class Manifest(Layout):
    """Lists the patches that `manifest.csv` under the root names, a row a patch.

    Columns are path (relative to the root) and label, optionally split (train, val, test), group, score in [0, 1], mpp
    (microns per pixel of the file), batch (plate, experiment) and dose (above 0); other columns are ignored. The file
    is CSV in UTF-8, divided by commas, semicolons, tabs or bars; numbers have a decimal point. An empty cell, NA, None
    and the like mean "not given": a patch without group stands alone. `ignore` names classes to leave out;
    `follow_links` allows files that lie outside of the root, behind symbolic links.
    """

    def __init__(self, root: Path, *, ignore: list[str] = [], follow_links: bool = False):  # noqa: B006 -- read only
        self.root, self.ignore, self._follow_links = root, ignore, follow_links
        self._file = root / "manifest.csv"
        self._real_root, self._folders = os.path.join(os.path.realpath(root), ""), {}

    def records(self) -> list[PatchRecord]:
        """Every patch of every class that is not ignored, sorted by id."""
        absent, lines, found = [], {}, []
        for number, row in self._rows():
            record, exists = self._record(row, where=f"{self._file}, line {number}")
            if (first := lines.setdefault(record.id, number)) != number:
                raise UserError(f"{self._file}, line {number}: {record.id} stands already on line {first}")
            if not exists:
                absent.append(record.id)
            found.append(record)
        if absent:
            raise UserError(f"{self._file}: names files that do not exist ({len(absent)}): {abbreviate(absent)}")
        records = in_order(found, ignore=self.ignore)
        alone = sum(record.group is None for record in records)
        if self._has_groups and alone:
            self._reading.append(f"{alone} patches name no group (an empty cell, NA or the like): each stands alone")
        return records

    def reading(self) -> list[str]:
        return self._reading

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The cells of each row by the name of their column, stripped, with the line that the row ends on."""
        try:
            with open(regular(self._file), newline="", encoding="utf-8-sig") as file:
                # The delimiter is the one that finds the most known columns.
                delimiter = max(",;\t|", key=lambda d: len(set(COLUMNS).intersection(_columns(file, d)[0])))
                columns, reader = _columns(file, delimiter)
                self._check_columns(columns)
                known = [(name, columns.index(name)) for name in COLUMNS if name in columns]
                for cells in reader:
                    if not any(map(str.strip, cells)):
                        continue
                    where = f"{self._file}, line {reader.line_num}"
                    if len(cells) > len(columns):
                        raise UserError(
                            f"{where}: has {len(cells)} cells, the heading {len(columns)}; put a cell that holds the "
                            'delimiter in "quotes", and write numbers with a decimal point'
                        )
                    row = {name: cells[place].strip() for name, place in known if place < len(cells)}
                    if (longest := max(map(len, row.values()), default=0)) > _MAX_CELL:
                        raise UserError(f"{where}: a cell has {longest} characters, at most {_MAX_CELL} are read")
                    yield reader.line_num, row
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self._file}: cannot be read as CSV in UTF-8 ({error}); save it so") from error

    def _check_columns(self, columns: list[str]) -> None:
        others = [name for name in columns if name not in (*COLUMNS, "patch")]  # a patch is no slip for a batch
        slips = [(name, known) for name in others for known in COLUMNS if _one_slip(name, known)]
        found = abbreviate(columns, limit=10) or "nothing"
        faults = [f"column {name!r}: did you mean {known!r}? Rename it, whatever it holds" for name, known in slips]
        faults += [f"no column {name}; found: {found}" for name in COLUMNS[:2] if name not in columns]
        faults += [f"{n} columns are called {name!r}; keep one" for name in COLUMNS if (n := columns.count(name)) > 1]
        if faults:
            raise UserError(f"{self._file}: {faults[0]}")
        ignored = [name for name in columns if name and name not in COLUMNS]
        self._reading = ["read from manifest.csv" + (f"; columns ignored: {abbreviate(ignored)}" if ignored else "")]
        self._has_groups = "group" in columns

    def _record(self, row: dict[str, str], *, where: str) -> tuple[PatchRecord, bool]:
        """The patch of a row, and whether its file exists."""
        path, label = row.get("path"), row.get("label")
        if not path or not label:
            raise UserError(f"{where}: path and label must not be empty")
        if _is_absent(label) and label not in self.ignore and label.casefold() != "unknown":
            raise UserError(
                f"{where}: label {label!r} means that no label is given; name the class otherwise, remove the row, or "
                f"list {label!r} in data.layout.ignore"
            )
        relative, file, exists = self._find(path, where=where)
        words = (row.get(name, "") for name in ("split", "group", "batch"))
        word, group, batch = (None if _is_absent(cell) else cell for cell in words)
        split = word and split_of(word)
        if word and not split:
            raise UserError(
                f"{where}: unknown split {word!r}; expected one of {', '.join(SPLITS)}{nearest(word, SPLITS)}"
            )
        score = number(row.get("score", ""), where=f"{where}, score", low=0, high=1)
        mpp = number(row.get("mpp", ""), where=f"{where}, mpp", low=0.001, high=1000)
        dose = number(row.get("dose", ""), where=f"{where}, dose", low=0, high=1e12) or None  # 0: no treatment
        return PatchRecord(relative, Path(file), label, split, group, score, mpp, batch, dose), exists

    def _find(self, path: str, *, where: str) -> tuple[str, str, bool]:
        """A path relative to the root in its shortest form, that of its file, and whether this exists."""
        relative = os.path.normpath(path.replace("\\", "/"))
        if _OUTSIDE.match(relative):
            raise UserError(
                f"{where}: {path} names no file inside {self.root}; paths are relative to the manifest's folder"
            )
        file = f"{self.root}/{relative}"
        folder, _, name = relative.rpartition("/")
        if folder not in self._folders or is_hidden(name):
            if hidden := [part for part in relative.split("/") if is_hidden(part)]:
                raise UserError(f"{where}: {path}: {hidden[0]} is hidden or a system's, no patch; remove the row")
            self._folders[folder] = os.path.realpath(f"{self.root}/{folder}")  # takes long, so once a folder
        try:
            mode = os.lstat(file).st_mode
        except OSError:
            mode = 0
        is_link = stat.S_ISLNK(mode)
        real = os.path.realpath(file) if is_link else f"{self._folders[folder]}/"
        if not self._follow_links and not real.startswith(self._real_root):
            raise UserError(
                f"{where}: {path} leads outside of {self.root} by a symbolic link; set data.layout.follow_links=true "
                "where you made that link yourself"
            )
        return relative, file, os.path.isfile(file) if is_link else stat.S_ISREG(mode)


def _is_absent(cell: str) -> bool:
    return cell.casefold() in _ABSENT


def _columns(file: TextIO, delimiter: str) -> tuple[list[str], Iterator[list[str]]]:
    """The heading's cells, in small letters and without blanks, and the reader of the rows below them."""
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            # Excel may begin a file with a line that names the delimiter.
            if any(cell.strip() for cell in row) and not re.match("sep=", row[0]):
                return [re.sub(r"[\s\ufeff\u200b]", "", cell).casefold() for cell in row], reader
    except csv.Error:
        pass  # of another delimiter's file
    return [], reader


def _one_slip(a: str, b: str) -> bool:
    """Whether two words differ by one letter (more, less or another), or by two neighbours that changed places."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[2:] == b[2:] and a[:2] == b[1::-1])


def number(text: str, *, where: str, low: float, high: float) -> float | None:
    """The number in a cell, None where it says that none is known; UserError for another text or a number outside."""
    if text.casefold() in _NO_NUMBER:
        return None
    try:
        value = float(text.replace("_", "?"))  # Python would skip the _
    except ValueError as error:
        hint = "; write it with a decimal point" if "," in text else ""
        raise UserError(f"{where}: {text!r} is no number{hint}") from error
    if not low <= value <= high:
        raise UserError(f"{where}: {value} is outside [{low}, {high}]")
    return value

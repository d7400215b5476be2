"""Tables that name image files: rows of a CSV by the names of their columns, and files that lie below a root."""

import csv
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TextIO

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular
from cellflux_bridge.base.walk import is_hidden

# What R, pandas, Excel and people write where a value is not known.
_ABSENT = {"", *"na n/a n.a. #n/a <na> nan none null nil (null) - -- ? missing unknown".split()}
_NO_NUMBER = _ABSENT - {"nan"}  # nan is a calculation that failed
_OUTSIDE = re.compile(r"/|\.\.(/|$)|\.$|[A-Za-z]:|.*\0", re.DOTALL)
_MAX_CELL = 4096


def table_rows(
    file: Path, known: Collection[str], *, check: Callable[[list[str]], None]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The cells of each row in the `known` columns, by their names and stripped, with the line that the row ends on.

    The file is CSV in UTF-8, divided by commas, semicolons, tabs or bars, whichever finds the most known columns. Names
    are as `column_name` writes them; `check` sees those of the heading, in order, before the first row. Raises
    UserError, which names the line, for a row with more cells than the heading and for a cell of more than 4096
    characters.
    """
    try:
        with open(regular(file), newline="", encoding="utf-8-sig") as text:
            delimiter = max(",;\t|", key=lambda d: len(set(known).intersection(_columns(text, d)[0])))
            columns, reader = _columns(text, delimiter)
            check(columns)
            places = [(name, columns.index(name)) for name in known if name in columns]
            for cells in reader:
                if not any(map(str.strip, cells)):
                    continue
                where = f"{file}, line {reader.line_num}"
                if len(cells) > len(columns):
                    raise UserError(
                        f"{where}: has {len(cells)} cells, the heading {len(columns)}; put a cell that holds the "
                        'delimiter in "quotes", and write numbers with a decimal point'
                    )
                row = {name: cells[place].strip() for name, place in places if place < len(cells)}
                if (longest := max(map(len, row.values()), default=0)) > _MAX_CELL:
                    raise UserError(f"{where}: a cell has {longest} characters, at most {_MAX_CELL} are read")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV in UTF-8 ({error}); save it so") from error


def column_name(cell: str) -> str:
    """A cell of a heading in small letters and without blanks."""
    return re.sub(r"[\s\ufeff\u200b]", "", cell).casefold()


def _columns(file: TextIO, delimiter: str) -> tuple[list[str], Iterator[list[str]]]:
    """The heading's names, and the reader of the rows below them."""
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            # Excel may begin a file with a line that names the delimiter.
            if any(cell.strip() for cell in row) and not re.match("sep=", row[0]):
                return list(map(column_name, row)), reader
    except csv.Error:
        pass  # of another delimiter's file
    return [], reader


class FilesBelow:
    """Finds the files that a table names by their paths relative to a root; `follow_links` allows symbolic links that
    lead outside of it."""

    def __init__(self, root: Path, *, follow_links: bool):
        self.root, self._follow_links = root, follow_links
        self._real_root, self._folders = os.path.join(os.path.realpath(root), ""), {}

    def find(self, path: str, *, where: str) -> tuple[str, str, bool]:
        """A path relative to the root in its shortest form, that of its file, and whether this exists.

        Raises UserError for a path that leaves the root, and for a hidden file.
        """
        relative = os.path.normpath(path.replace("\\", "/"))
        if _OUTSIDE.match(relative):
            raise UserError(f"{where}: {path} names no file inside {self.root}; paths are relative to it")
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


def is_absent(cell: str) -> bool:
    """Whether a cell says that its value is not known."""
    return cell.casefold() in _ABSENT


def one_slip(a: str, b: str) -> bool:
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

"""Text files that appear whole or not at all, what may stand in them, and safe names for them."""

import csv
import errno
import hashlib
import io
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from cellflux_bridge.base.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_HEADERS = Lock()


def require_json(output: Path) -> None:
    """UserError for an --output that cannot be a JSON file; to be asked before the work that leads to it, too."""
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"--output {output}: expected a file name that ends in .json; tables are written beside it")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, which takes the name `path` after the body, or is removed if the body fails.

    What the body wrote is on the disk before the name is: a loss of power leaves the old file or the new one, whole.
    """
    mark = f".{os.getpid()}.tmp"
    temporary = path.with_name(safe_name(path.name, room=len(mark)) + mark)
    try:
        temporary.unlink(missing_ok=True)  # a link here, in a folder from somebody else, would lead out of the folder
        temporary.touch(exist_ok=False)
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk Python does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def regular(path: Path) -> Path:
    """`path`, where it is a file that can be read to its end; OSError for a pipe or device, which could be waited for
    for ever, and for a missing one."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return path


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and writes their lists itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives know no such wait
            raise
    finally:
        os.close(descriptor)


def reserved(path: Path, dtype: type, shape: tuple[int, ...]) -> "np.ndarray":
    """A new memory-mapped .npy file of zeros whose place on the disk is taken: a map that meets a full disk later on
    kills its process without a word. OSError where the disk has no such place."""
    from numpy.lib.format import open_memmap

    array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)
    return array


def mapped(path: Path, *, mode: str = "r") -> "np.ndarray":
    """The array in a .npy file, memory-mapped; nothing is unpickled.

    One thread at a time reads a header: NumPy parses it by `ast`, whose threads share a count of their depth before
    Python 3.11.8 and 3.12.2, so that a good file could end in a SystemError (python/cpython, issue 106905).
    OSError for what is no regular file; ValueError for a file that is truncated or no such array.
    """
    from numpy.lib.format import open_memmap

    with _HEADERS:
        return open_memmap(regular(path), mode=mode)


def replace_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then rename it to `path`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def without_nan(value: Any) -> Any:
    """A value for JSON, with None for each number that is not finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def safe_name(text: str, *, room: int = 0) -> str:
    """One path component for any text (a label, an id): at most 255 bytes with `room` bytes that will follow it.

    Letters, digits and . _ - stay; anything else becomes _, and a name that starts with a dot gets _ before it. A text
    that had to be changed or cut ends in a short hash of it, so that two texts never share a name.
    """
    kept = re.sub(r"[^\w.-]+", "_", text).strip()
    kept = f"_{kept}" if kept.startswith(".") or not kept else kept
    mark = f"-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    most = 255 - room
    if kept == text and len(kept.encode()) <= most:
        return kept
    return kept.encode()[: most - len(mark)].decode(errors="ignore") + mark


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV, None as an empty cell. A text that looks like a formula gets a ' in front, and so does such a text
    with ' in front: `csv_rows` gives back what was written."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def unguarded(cell: str) -> str:
    """A cell of `csv_text` without the ' before a formula."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV that `csv_text` wrote, by the columns' names, without the ' before a formula.

    Raises UserError, which names the line, for a row with more or fewer cells than the header, and for a file that is
    no CSV in UTF-8.
    """
    with open(regular(path), newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            for row in reader:
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} cells, but the header has {len(header)}")
                yield {name: unguarded(cell) for name, cell in zip(header, row, strict=True)}
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def run_of(folder: Path) -> Path:
    """The run that a checkpoint's folder belongs to; any other folder is its own."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder

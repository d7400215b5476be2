"""Which image files a folder holds: the one place that decides it, for training, counting and label maps alike."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import SUFFIXES

# Image files that are not read, but counted, so that nobody misses them unawares.
_OTHER_SUFFIXES = tuple(
    ".apng .avif .bif .bmp .czi .dcm .dib .dicom .gif .heic .heif .ico .j2c .j2k .jfif .jp2 .jpe .jpf .jpx .jxl .lif "
    ".mrxs .nd2 .ndpi .npy .pbm .pgm .pnm .ppm .qptiff .scn .svs .svslide .tga .vms .vsi .webp".split()
)
# What operating systems, storage devices and archives put beside the user's files. Dot files are hidden as well.
_SYSTEM = {
    *"__macosx __pycache__ @eadir @tmp @recycle @recently-snapshot #recycle #snapshot $recycle.bin recycler".split(),
    *("lost+found", "system volume information", "network trash folder"),
}


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's own name is a hidden one, a backup's or a system's."""
    return name.startswith((".", "~")) or name.endswith("~") or name.casefold() in _SYSTEM


def is_image(file: Path) -> bool:
    """Whether a file's suffix is one that is read."""
    return file.name.lower().endswith(SUFFIXES)


def subfolders(folder: Path) -> list[Path]:
    """The folders inside a folder that are neither hidden nor a system's, sorted by name."""
    return [folder / _in_utf8(entry).name for entry in _entries(folder) if entry.is_dir()]


def image_files(folder: Path) -> list[Path]:
    """Every image file at any depth below a folder, sorted. Raises UserError as `walk` and `refuse_repeats` do."""
    files = sorted(filter(is_image, walk(folder)))
    refuse_repeats(files)
    return files


def walk(folder: str | Path) -> Iterator[Path]:
    """The files at any depth below a folder whose suffix is an image's, read or not (see `is_image`).

    Hidden and system folders are not entered, and symbolic links are followed. Raises UserError for a folder that is
    reached twice (a link may lead back to a folder around it) or cannot be read, and for a name that is not UTF-8.
    """
    seen: dict[tuple[int, int], str] = {}
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        status = os.stat(path)
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            raise UserError(f"{path} and {first} are the same folder: remove the link to it")
        for entry in _entries(path):
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES + _OTHER_SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                yield Path(_in_utf8(entry).path)  # a link that leads nowhere, too: whoever reads it says so


def refuse_repeats(files: Iterable[Path]) -> None:
    """UserError where two of the files are the same one on disk, by a symbolic or a hard link or by letter case."""
    seen: dict[tuple[int, ...], Path] = {}
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            continue  # whoever reads it says so
        # Some network drives repeat inode numbers, hence size and time.
        first = seen.setdefault((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns), file)
        if first is not file:
            raise UserError(f"{first} and {file} are the same file: remove one of them, so that it is counted once")


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _in_utf8(entry: os.DirEntry) -> os.DirEntry:
    """The entry itself; UserError where its path is not UTF-8, because tables, reports and checkpoints name it."""
    try:
        entry.path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{entry.path!r}: this name is not UTF-8; rename the file or folder") from error
    return entry

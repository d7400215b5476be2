"""One writer at a time: a folder that a process writes to is locked, and whoever comes second is told by whom."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text

LOCK, HOLDER = ".lock", ".lock.holder"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block in which this process alone writes to `folder`, which is made where it is missing.

    The lock is the operating system's, so it ends with its process however that ends. UserError, which names the
    holder, where another process (or another block of this one) has it. On a disk that knows no locks the block runs
    without one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LOCK, HOLDER):
        if (folder / name).is_symlink():  # in a folder from somebody else it would lead out of the folder
            raise UserError(f"{folder / name}: is a symbolic link; remove it, or choose another output folder")
    lock = FileLock(folder / LOCK, thread_local=False, is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with suppress(OSError, UnicodeDecodeError):
            holder = (folder / HOLDER).read_text(encoding="utf-8").strip()[:200] or holder
        raise UserError(
            f"{folder}: {holder} writes here; wait until it has ended, stop it, or choose another output folder"
        ) from None
    except NotImplementedError:
        pass
    try:
        if lock.is_locked:
            me = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
            replace_text(folder / HOLDER, me + "\n")
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()

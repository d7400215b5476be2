"""Patches decoded once into a memory-mapped array. A build that was stopped goes on where it was."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from tokenize import TokenError
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import mapped, reserved
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config.schema import ReceivedPath
from cellflux_bridge.data.index import Index, remembered
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.preprocessing import Preprocessing, require_no_enlargement
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import stain

_CACHE_FORMAT = 3
_NUM_REFERENCE_IMAGES = 256
# A build that is killed decodes no more than so many images again.
_NUM_AT_RISK = 1024
# A file of a build: the size and time of change (N, 2) int64 of the image file that each patch was made from.
_MADE_FROM = "made_from.npy"


def cached_pixels(
    config: DataConfig, index: Index, *, seed: int, reference: stain.StainReference | None, build: bool
) -> tuple[np.ndarray, Preprocessing]:
    """Every patch (N, H, W, C) uint8, memory-mapped, and how it was made; built first where there is no cache yet.

    Raises UserError that lists unreadable files, and for a cache that is damaged, missing and not to be built, or too
    large for the disk.
    """
    stats = _file_stats(index)
    folder, building = _folders(config, index, stats, seed=seed, reference=reference)
    if not build and not folder.exists():
        raise UserError(f"{folder}: no cache here; fill it with: cellflux-bridge data check CONFIG")
    if not folder.exists():
        with _only_process(building):
            try:
                if not folder.exists():
                    _build(building, config, index, stats, seed=seed, reference=reference)
                    os.replace(building, folder)
                    (folder / _MADE_FROM).unlink()
            except OSError:
                if not folder.exists():  # else another process was faster, on a disk that knows no locks
                    raise
            finally:
                if not (building / _MADE_FROM).exists():
                    shutil.rmtree(building, ignore_errors=True)
    last, size = (len(stats), config.channels), config.image_size
    pixels = _mapped(folder / "pixels.npy", np.uint8, lambda n, h, w, c: (n, c) == last and min(h, w) >= size)
    status = os.stat(folder / "pixels.npy")
    pixels = remembered((str(folder), status.st_ino, status.st_size, status.st_mtime_ns), lambda: pixels)
    return pixels, Preprocessing.load(folder / "preprocessing.json")


def _file_stats(index: Index) -> np.ndarray:
    """Size and time of change of every image, (N, 2) int64."""
    root, stats = str(index.root), np.empty((len(index.ids), 2), np.int64)
    try:
        for i, file in enumerate(index.files):
            stats[i] = images.stat_of(os.path.join(root, file))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove it") from error
    return stats


def _folders(
    config: DataConfig, index: Index, stats: np.ndarray, *, seed: int, reference: stain.StainReference | None
) -> tuple[Path, Path]:
    """Where the cache belongs and where it is built: in `cache_dir`, or in its default where somebody else named it and
    the cache is not there. The names are keys of the content; the second does not depend on
    the files' sizes and times, so that a build goes on after some of its files were mended."""
    normalised = config.stain.mode == "normalise"
    settings = {
        "format": _CACHE_FORMAT,
        # Sizes and times alone do not tell two data sets apart whose files share names: archives may zero the times.
        "root": str(config.root.expanduser().resolve()),
        "image_size": config.image_size,
        "crop": config.crop,
        "stain": config.stain.method if normalised else None,
        "reference": reference.values if normalised and reference else None,
        **({} if config.channels == 3 else {"channels": config.channels}),
        **({"value_range": config.value_range} if config.value_range else {}),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + repr(index.ids).encode())
    if normalised and reference is None:  # it comes from the training split
        key.update(repr(seed).encode() + index.splits.tobytes())
    building = f"{key.hexdigest()[:24]}.building"
    key.update(stats.tobytes())
    place, name = config.cache_dir.expanduser(), key.hexdigest()[:24]
    if isinstance(place, ReceivedPath) and not (place / name).exists():
        place = DataConfig.model_fields["cache_dir"].default.expanduser()
    return place / name, place / building


def _only_process(building: Path) -> AcquireReturnProxy:
    """A lock inside a folder that is made for it. It ends with its process; who comes second waits for the first."""
    lock, patience = FileLock(building / "lock"), 1.0
    while True:
        try:
            building.mkdir(parents=True, exist_ok=True)
            return lock.acquire(timeout=patience)
        except Timeout:
            print(f"{building}: another process fills this cache; waiting for it", file=sys.stderr)
            patience = -1.0  # for ever
        except FileNotFoundError:
            continue  # the other process has renamed or removed the folder
        except OSError as error:
            raise UserError(f"data.cache_dir: {building.parent} cannot be written to ({error.strerror})") from error


def _build(
    folder: Path,
    config: DataConfig,
    index: Index,
    stats: np.ndarray,
    *,
    seed: int,
    reference: stain.StainReference | None,
) -> None:
    """Decodes what is not there yet into arrays in `folder`."""
    num, preprocessing = len(stats), Preprocessing.of(config)

    def each(work: Callable[[int], Any], numbers: Sequence[int], desc: str) -> list:
        """`work` of these patches; UserError that lists the files for which it raised one."""

        def work_or_error(number: int) -> Any:
            try:
                return work(number)
            except UserError as error:
                return error

        results = threaded(work_or_error, numbers, workers=config.workers, desc=desc)
        errors = [str(result) for result in results if isinstance(result, UserError)]
        if errors:
            shown = "\n  ".join(errors[:10]) + (f"\n  and {len(errors) - 10} more" if len(errors) > 10 else "")
            raise UserError(
                f"{config.root}: {len(errors)} of {num} images cannot be used; mend or remove them, or go on without "
                f"them (data.without; cellflux-bridge data check lists them):\n  {shown}"
            )
        return results

    def size(i: int) -> tuple[int, int]:
        height, width = preprocessing.read_size(index.file(i))
        require_no_enlargement(config, preprocessing, height, width, name=str(index.file(i)))
        return preprocessing.scaled_size(height, width, name=str(index.file(i)))

    def prepared(i: int) -> np.ndarray:
        return preprocessing.prepare(preprocessing.read(index.file(i)), name=str(index.file(i)))

    # One array needs one size: images are cut to the smallest height and width there is.
    height, width = np.min(each(size, range(num), "reading image sizes"), axis=0).tolist()
    if config.stain.mode == "normalise":
        if reference is None:
            train = np.flatnonzero(index.splits == SPLITS.index("train"))
            chosen = np.sort(numpy_generator(seed, "stain").permutation(train)[:_NUM_REFERENCE_IMAGES])
            try:
                shown = each(prepared, chosen, "decoding patches for the reference stain")
            except UserError:
                each(prepared, range(num), "looking for more unreadable files")
                raise
            reference = stain.fit_reference(config.stain.method, shown)
        preprocessing = replace(preprocessing, reference=reference)
    shape, missing = (num, height, width, config.channels), np.arange(num)
    try:
        if is_begun := Preprocessing.load(folder / "preprocessing.json") == preprocessing:
            pixels = _mapped(folder / "pixels.npy", np.uint8, lambda *found: found == shape, mode="r+")
            made_from = _mapped(folder / _MADE_FROM, np.int64, lambda *found: found == stats.shape, mode="r+")
            missing = np.flatnonzero((made_from != stats).any(axis=1))
    except UserError:
        is_begun = False
    free, needed = shutil.disk_usage(folder).free, len(missing) * height * width * config.channels
    if free < needed:
        raise UserError(
            f"data.cache_dir: {folder.parent} has {free / 1e9:.1f} GB free, the cache needs {needed / 1e9:.1f} GB; "
            "make room or set another data.cache_dir"
        )
    if not is_begun:
        preprocessing.save(folder / "preprocessing.json")
        pixels = reserved(folder / "pixels.npy", np.uint8, shape)
        made_from = reserved(folder / _MADE_FROM, np.int64, stats.shape)
        made_from[:] = -1
    lock, at_risk = Lock(), []

    def save() -> None:
        pixels.flush()  # before `made_from` says so
        made_from[at_risk] = stats[at_risk]
        made_from.flush()
        at_risk.clear()

    def decode(i: int) -> None:
        pixels[i] = preprocessing.cut(prepared(i), height, width)
        with lock:
            at_risk.append(i)
            if len(at_risk) >= _NUM_AT_RISK:
                save()

    try:
        each(decode, missing, "decoding patches")
    finally:
        save()


def _mapped(file: Path, dtype: type, fits: Callable[..., bool], *, mode: str = "r") -> np.ndarray:
    """The array in a .npy file, memory-mapped, so that no header makes it take memory; its sizes must be accepted."""
    try:
        found = mapped(file, mode=mode)
        if found.dtype != dtype or not fits(*found.shape):
            raise ValueError(f"it holds {found.dtype} {found.shape}")
        return found
    except (OSError, ValueError, TypeError, SyntaxError, OverflowError, TokenError) as error:
        raise UserError(f"{file.parent}: a damaged cache ({error}); remove this folder, it is made anew") from error

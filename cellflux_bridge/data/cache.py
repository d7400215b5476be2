"""Patches decoded once into a memory-mapped array."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.data.layout.base import PatchRecord
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import stain

_CACHE_FORMAT = 2


_NUM_REFERENCE_IMAGES = 256


def cache_folder(
    config: DataConfig, records: Sequence[PatchRecord], *, seed: int, reference: stain.StainReference | None = None
) -> Path:
    """Where the cache of these records belongs; the name is the content key."""
    normalised = config.stain.mode == "normalise"
    settings = {
        "format": _CACHE_FORMAT,
        # Sizes and times alone do not tell two data sets apart whose files share names: archives may zero the times.
        "root": str(config.root.expanduser().resolve()),
        "image_size": config.image_size,
        "crop": config.crop,
        "stain": config.stain.method if normalised else None,
        "reference": reference.values if normalised and reference else None,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for record in records:
        try:
            status = record.file.stat()
        except OSError as error:
            raise UserError(f"{record.file}: cannot be read ({error.strerror}); mend or remove it") from error
        # The reference stain comes from the training split, so a normalised cache depends on the split as well.
        fields = (record.id, status.st_size, status.st_mtime_ns, *((record.split, seed) if normalised else ()))
        key.update(repr(fields).encode())
    return config.cache_dir.expanduser() / key.hexdigest()[:24]


def cached_pixels(
    config: DataConfig,
    records: Sequence[PatchRecord],
    *,
    seed: int,
    reference: stain.StainReference | None,
    build: bool,
) -> tuple[np.ndarray, Preprocessing]:
    folder = cache_folder(config, records, seed=seed, reference=reference)
    if not build and not folder.exists():
        raise UserError(f"{folder}: no cache here; fill it with: cellflux-bridge data check CONFIG")
    if not folder.exists():
        building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            building.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {folder.parent} cannot be written to ({error.strerror})") from error
        try:
            _build_cache(building, config, records, seed=seed, reference=reference)
            os.replace(building, folder)
        except OSError:
            if not folder.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    try:
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: a damaged cache ({error}); remove this folder, it is made anew") from error
    return pixels, Preprocessing.load(folder / "preprocessing.json")


def _build_cache(
    folder: Path,
    config: DataConfig,
    records: Sequence[PatchRecord],
    *,
    seed: int,
    reference: stain.StainReference | None,
) -> None:
    plain = Preprocessing(config.image_size, config.crop)
    over_all = partial(threaded, items=range(len(records)), workers=config.workers)
    sizes = over_all(lambda i: _or_error(_scaled_size, plain, records[i].file), desc="reading image sizes")
    _raise_unreadable(sizes, config.root)
    # One array needs one size: images are cut to the smallest height and width there is.
    height, width = np.min(sizes, axis=0).tolist()
    _require_space(folder, len(records) * height * width * 3)
    pixels = np.lib.format.open_memmap(
        folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=(len(records), height, width, 3)
    )

    def decode(i: int) -> UserError | None:
        rgb = _or_error(images.read_rgb, records[i].file)
        if isinstance(rgb, UserError):
            return rgb
        pixels[i] = images.centre_crop(plain.scale(rgb, name=str(records[i].file)), height, width)
        return None

    _raise_unreadable(over_all(decode, desc="decoding patches"), config.root)
    preprocessing = plain
    if config.stain.mode == "normalise":
        if reference is None:
            train = [i for i, record in enumerate(records) if record.split == "train"]
            chosen = numpy_generator(seed, "stain").permutation(train)[:_NUM_REFERENCE_IMAGES]
            reference = stain.fit_reference(config.stain.method, [pixels[i] for i in sorted(chosen)])
        preprocessing = replace(plain, reference=reference)

        def normalise(i: int) -> None:
            pixels[i] = preprocessing.normalise(pixels[i])

        over_all(normalise, desc="normalising stain")
    pixels.flush()
    preprocessing.save(folder / "preprocessing.json")


def _require_space(folder: Path, num_bytes: int) -> None:
    """A memory map that meets a full disk kills the process without a word, so the space is asked for before."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"data.cache_dir: {folder.parent} has {free / 1e9:.1f} GB free, the cache needs {num_bytes / 1e9:.1f} GB; "
            "make room or set another data.cache_dir"
        )


def _scaled_size(preprocessing: Preprocessing, file: Path) -> tuple[int, int]:
    return preprocessing.scaled_size(*images.read_size(file), name=str(file))


def _or_error(work, *arguments):
    try:
        return work(*arguments)
    except UserError as error:
        return error


def _raise_unreadable(results: Sequence, root: Path) -> None:
    errors = [str(result) for result in results if isinstance(result, UserError)]
    if errors:
        shown = "\n  ".join(errors[:10]) + (f"\n  and {len(errors) - 10} more" if len(errors) > 10 else "")
        raise UserError(
            f"{root}: {len(errors)} of {len(results)} images cannot be used; mend or remove them:\n  {shown}"
        )

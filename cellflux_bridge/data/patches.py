"""Patches of a configuration, decoded once into a memory-mapped cache and drawn from it."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cellflux_bridge import images, registry, stain
from cellflux_bridge.config import DataConfig
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.records import SPLITS, PatchRecord, assign_splits, check_groups, some
from cellflux_bridge.errors import UserError
from cellflux_bridge.progress import threaded
from cellflux_bridge.randomness import numpy_generator
from cellflux_bridge.schema import nearest

_CACHE_FORMAT = 2
_NUM_REFERENCE_IMAGES = 256

# A patch is of a level where its score differs by no more.
SCORE_WINDOW = 0.075


def near_level(scores: np.ndarray, level: float) -> np.ndarray:
    """Which scores (n,) are of a level, as (n,) bool."""
    return np.abs(scores - level) <= SCORE_WINDOW + 1e-6


@dataclass(frozen=True)
class Patches:
    """All patches of a data set at the network's scale, in the order of `ids`.

    `pixels` (N, H, W, 3) uint8, memory-mapped, H and W at least image_size; `labels` (N,) int64 into `classes`;
    `splits` (N,) into SPLITS; `groups` (N,) int64, patches of one group sharing a number; `scores` (N,) float32, NaN
    where the data has none; `ids` the paths relative to the root.
    """

    pixels: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    group_names: tuple[str, ...]
    scores: np.ndarray
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def indices(self, split: str, label: str | None = None) -> np.ndarray:
        """Numbers of the patches of a split, of one class or of all."""
        chosen = self.splits == SPLITS.index(split)
        if label is not None:
            chosen &= self.labels == self.class_index(label)
        return np.flatnonzero(chosen)

    def scores_towards(self, label: str, indices: np.ndarray) -> np.ndarray:
        """Scores (n,) that rise towards a class: 1 less the data's score, unless it is the last class."""
        scores = self.scores[indices]
        return scores if label == self.classes[-1] else 1 - scores

    def class_index(self, label: str) -> int:
        if label not in self.classes:
            raise UserError(f"no class {label!r} here{nearest(label, self.classes)}; known: {', '.join(self.classes)}")
        return self.classes.index(label)

    def sample(self, split: str, label: str | None = None, *, num: int | None, seed: int) -> np.ndarray:
        """At most `num` patches of a split (None: all), drawn by the seed; fewer are the beginning of more."""
        indices = self.indices(split, label)
        return numpy_generator(seed, "sample", split, str(label)).permutation(indices)[:num]

    def centre(self, indices: Sequence[int]) -> torch.Tensor:
        """The middle patch of each image: (B, 3, S, S) uint8."""
        return self.cut(indices, self.middle_places(len(indices)))

    def random(self, indices: Sequence[int], *, flips: bool, generator: torch.Generator) -> torch.Tensor:
        """A random patch of each image, (B, 3, S, S) uint8, with `flips` in one of the square's eight symmetries."""
        return self.cut(indices, self.random_places(len(indices), flips=flips, generator=generator))

    def middle_places(self, num: int) -> np.ndarray:
        """Where the middle patches of `num` images are: see `cut`."""
        size = self.preprocessing.image_size
        return np.tile([(self.pixels.shape[1] - size) // 2, (self.pixels.shape[2] - size) // 2, 0], (num, 1))

    def random_places(self, num: int, *, flips: bool, generator: torch.Generator) -> np.ndarray:
        """Where random patches of `num` images are, with `flips` in one of the square's eight symmetries: see `cut`."""
        size = self.preprocessing.image_size
        room = (self.pixels.shape[1] - size + 1, self.pixels.shape[2] - size + 1, 8 if flips else 1)
        return (torch.rand(num, 3, generator=generator).numpy() * room).astype(int)

    def cut(self, indices: Sequence[int], places: np.ndarray) -> torch.Tensor:
        """The patch of each image at a place, (B, 3, S, S) uint8; `places` (B, 3) int64 hold top, left and symmetry:
        that many quarter turns, from 4 on of the mirrored patch."""
        size = self.preprocessing.image_size
        crops = []
        for index, (top, left, symmetry) in zip(indices, places, strict=True):
            crop = self.pixels[index, top : top + size, left : left + size]
            crops.append(np.rot90(crop if symmetry < 4 else crop[:, ::-1], symmetry % 4))
        return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def list_records(config: DataConfig, *, seed: int) -> tuple[list[PatchRecord], tuple[str, ...]]:
    """The patches that a configuration names, every one with a split, and its classes.

    Raises UserError for a class that the data lacks or that the configuration does not know, for fewer than two
    classes, and for groups that stand in two splits.
    """
    records = registry.build("layout", config.layout, config.root.expanduser()).records()
    found = Counter(record.label for record in records)
    classes = tuple(config.classes if config.classes is not None else sorted(found))
    for label in classes:
        if label not in found:
            raise UserError(
                f"data.classes: no patch of class {label!r} in {config.root}{nearest(label, found)}; "
                f"found: {', '.join(sorted(found)) or 'none'}"
            )
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(
            f"{config.root}: label {some([repr(u) for u in unknown])} is not in data.classes; add it there, "
            "or to data.layout.ignore to leave it out"
        )
    if len(classes) < 2:
        raise UserError(f"{config.root}: only one class ({', '.join(classes) or 'none'}); a bridge needs two")
    check_groups(records, origin=str(config.root))
    return assign_splits(records, val=config.split.val, test=config.split.test, seed=seed), classes


def frame_mpp(records: Sequence[PatchRecord], preprocessing: Preprocessing) -> float | None:
    """Microns per pixel of patches at the network's scale: their median; None where the data does not tell them for
    every patch, or where they differ by more than 5 %."""
    if not records or any(record.mpp is None for record in records):
        return None
    sizes = [(0, 0)] * len(records)
    if preprocessing.crop is None:
        sizes = threaded(images.read_size, [record.file for record in records], desc="reading image sizes")
    found = [r.mpp / preprocessing.scale_of(*size) for r, size in zip(records, sizes, strict=True)]
    return float(np.median(found)) if max(found) <= 1.05 * min(found) else None


def taken_from_training(config: DataConfig, *, seed: int) -> str | None:
    """What to tell of patches that the data itself names `train` and that were taken for a split it does not name."""
    named = registry.build("layout", config.layout, config.root.expanduser()).records()
    assigned = assign_splits(named, val=config.split.val, test=config.split.test, seed=seed)
    of_train = [now.split for was, now in zip(named, assigned, strict=True) if was.split == "train"]
    taken = Counter(split for split in of_train if split != "train")
    if not taken:
        return None
    splits = " and ".join(f"{count} {split}" for split, count in taken.items())
    keys = " ".join(f"data.split.{split}=0" for split in taken)
    return (
        f"WARNING: the data names {len(of_train)} patches train and none {' or '.join(taken)}: of these {splits}; "
        f"name such a split, or set {keys} to train on all (judges need a test split)"
    )


def load_patches(
    config: DataConfig, *, seed: int, reference: stain.StainReference | None = None, build: bool = True
) -> Patches:
    """The patches of a configuration, from the cache, which is made first where it is missing or stale.

    The cache key covers every file's path, size and time of change and all settings that touch pixels, so a changed,
    added or removed file makes a new cache. Where stain is normalised, `reference` replaces that of the training
    split. Raises UserError that lists unreadable files, for a data.cache_dir that cannot be written to, and where the
    cache is missing and not to be built.
    """
    records, classes = list_records(config, seed=seed)
    groups = [record.group if record.group is not None else f"\0{record.id}" for record in records]
    group_names, group_numbers = np.unique(groups, return_inverse=True)
    pixels, preprocessing = _cached_pixels(config, records, seed=seed, reference=reference, build=build)
    return Patches(
        pixels=pixels,
        ids=tuple(record.id for record in records),
        labels=np.array([classes.index(record.label) for record in records]),
        splits=np.array([SPLITS.index(record.split) for record in records]),
        groups=group_numbers,
        group_names=tuple(name.rpartition("\0")[2] for name in group_names.tolist()),
        scores=np.array([np.nan if r.score is None else r.score for r in records], np.float32),
        classes=classes,
        preprocessing=preprocessing,
    )


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


def _cached_pixels(
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

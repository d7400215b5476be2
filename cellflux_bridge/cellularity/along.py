"""Nuclei along trajectories and in the real patches that they are held against: the content of cellularity.json."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.cellularity.counting import count_arrays, list_images
from cellflux_bridge.cellularity.curves import Counted, Scored, curves_of, points
from cellflux_bridge.cellularity.export import as_json
from cellflux_bridge.cellularity.nuclei import Parameters
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.images import read_rgb
from cellflux_bridge.trajectory import TrajectoryHeader, read_header

_CHUNK = 64
_Real = tuple[Iterator[np.ndarray], list[str]]


def _of_class(patches: Patches, label: str) -> np.ndarray:
    """The numbers of the test patches of a class."""
    numbers = patches.indices("test", label)
    if len(numbers) == 0:
        raise UserError(
            f"no real test patch of class {label!r}; set data.split.test, or give --real-source/--real-target"
        )
    return numbers


def _of_patches(patches: Patches, numbers: np.ndarray) -> _Real:
    """The middle patches of these numbers, each a stack of one, and their groups."""
    chunks = (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))
    images = (rgb[None] for part in chunks for rgb in patches.centre(part).permute(0, 2, 3, 1).numpy())
    return images, [_group(patches, number) for number in numbers]


def _group(patches: Patches, number: int) -> str:
    return patches.group_names[patches.groups[number]]


def _of_folder(folder: Path) -> _Real:
    """The images of a folder, each a stack of one and a group of its own."""
    files = list_images(folder)
    return (read_rgb(file)[None] for file in files), [str(file) for file in files]


def _scale(folders: Sequence[Path], headers: Sequence[TrajectoryHeader]) -> float | None:
    """Microns per pixel of all frames, None where a trajectory does not know its own; UserError where they differ."""
    known = [header.mpp for header in headers]
    if None in known:
        return None
    for folder, mpp in zip(folders, known, strict=True):
        if mpp != known[0]:
            raise UserError(
                f"{folder}: {mpp:g} microns per pixel, but {folders[0]} has {known[0]:g}; count them apart, or give "
                "--mpp"
            )
    return known[0]


def along_trajectories(
    folders: Sequence[Path],
    *,
    patches: Patches | None = None,
    real_folders: tuple[Path, Path] | None = None,
    mpp: float | None = None,
    parameters: Parameters | None = None,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """The content of cellularity.json of trajectory folders of one transition.

    Real patches come from the test split of `patches`, which also tell the sources' groups, or from `real_folders`
    (source, target), or are left out. `mpp` is microns per pixel of frames and real patches (None: what the
    trajectories say). Raises UserError for trajectories of two transitions or scales, and where all sources, or all
    real patches of a class, are grey or inverted; single such images are left out and, in trajectories, counted.
    """
    parameters = Parameters() if parameters is None else parameters
    headers = [read_header(folder) for folder in folders]
    source, target = headers[0].source, headers[0].target
    for folder, header in zip(folders, headers, strict=True):
        if (header.source, header.target) != (source, target):
            raise UserError(f"{folder}: {header.source} -> {header.target}, but {folders[0]} is {source} -> {target}")
    mpp = _scale(folders, headers) if mpp is None else mpp
    groups = {} if patches is None else {id_: _group(patches, i) for i, id_ in enumerate(patches.ids)}

    def count(images: Iterator[np.ndarray], own: list[str], label: str) -> list[np.ndarray]:
        rows = count_arrays(images, mpp=mpp, parameters=parameters, workers=workers)
        return list(progress(rows, total=len(own), desc=f"nuclei of real {label}", unit="image"))

    real, scored = {}, None
    if real_folders is not None:
        found = {label: _of_folder(folder) for label, folder in zip((source, target), real_folders, strict=True)}
        real = {label: Counted.of(count(images, own, label), own) for label, (images, own) in found.items()}
    elif patches is not None:
        by_class = {label: _of_class(patches, label) for label in (source, target)}
        with_score = patches.indices("test")
        with_score = with_score[np.isfinite(patches.scores[with_score])]
        numbers = np.unique(np.concatenate([*by_class.values(), with_score]))
        rows = dict(zip(numbers, count(*_of_patches(patches, numbers), "patches"), strict=True))  # each counted once

        def counted(chosen: np.ndarray) -> Counted:
            return Counted.of([rows[i] for i in chosen], [_group(patches, i) for i in chosen])

        real = {label: counted(chosen) for label, chosen in by_class.items()}
        if len(with_score):
            scored = Scored(counted(with_score), patches.scores_towards(target, with_score))
    for label, of_class in real.items():
        of_class.require_some(0, of=f"real {label} patches")
    pair = (real[source], real[target]) if real else None
    options = {"mpp": mpp, "parameters": parameters, "seed": seed, "workers": workers}
    curves = [curves_of(folder, groups, pair, scored, **options) for folder in folders]
    real_points = {label: points(counted, [None], seed=seed) for label, counted in real.items()}
    levels = dict.fromkeys(level for each in curves for level in each.header.levels)
    by_level = () if scored is None else scored.points(sorted(levels), seed=seed)
    return as_json(curves, real_points, by_level, mpp=mpp, parameters=parameters, seed=seed)

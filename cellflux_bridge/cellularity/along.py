"""Nuclei along trajectories and in the real patches beside them: the content of cellularity.json."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import without_nan
from cellflux_bridge.base.progress import progress
from cellflux_bridge.cellularity.counter_error import relative_errors
from cellflux_bridge.cellularity.counting import count_arrays, list_images
from cellflux_bridge.cellularity.curves import Counted, Scored, checks, correlations, means
from cellflux_bridge.cellularity.measurement import QUANTITIES
from cellflux_bridge.cellularity.nuclei import Parameters, network_scale
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.images import read_rgb
from cellflux_bridge.trajectory import TrajectoryHeader, count_incomplete, iter_trajectory, read_header

FORMAT = 3
_CHUNK, _SOURCES_FOR_SCALE = 64, 16


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


def _require_rgb(channels: int, of: str) -> None:
    if channels != 3:
        raise UserError(f"{of}: {channels} channels; nuclei are counted in RGB images (H&E) only")


def _count_real(stacks: Iterable[np.ndarray], num: int, label: str, **options) -> list[np.ndarray]:
    """A row (1, 1 + Q) for each of `num` images, which come in stacks (B, H, W, 3)."""
    rows = (row[None] for table in count_arrays(stacks, **options) for row in table)
    return list(progress(rows, total=num, desc=f"nuclei of real {label}", unit="image"))


def _count_folder(folder: Path, label: str, **options) -> Counted:
    """The images of a folder, each a group of its own."""
    files = list_images(folder)
    stacks = (read_rgb(file)[None] for file in files)
    return Counted.of(_count_real(stacks, len(files), label, **options), [str(file) for file in files])


def _count_patches(patches: Patches, ends: tuple[str, str], **options) -> tuple[dict[str, Counted], Scored | None]:
    """The test patches of both classes, by class, and those with scores; each patch is counted once."""
    _require_rgb(patches.pixels.shape[-1], "the data")
    by_class = {label: patches.indices("test", label) for label in ends}
    for label, numbers in by_class.items():
        if len(numbers) == 0:
            raise UserError(
                f"no real test patch of class {label!r}; set data.split.test, or give --real-source/--real-target"
            )
    test = patches.indices("test")
    with_score = test[np.isfinite(patches.scores[test])]
    numbers = np.unique(np.concatenate([*by_class.values(), with_score]))
    chunks = (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))
    stacks = (patches.centre(part).permute(0, 2, 3, 1).numpy() for part in chunks)
    groups = {i: patches.group_names[patches.groups[i]] for i in numbers}
    rows = dict(zip(numbers, _count_real(stacks, len(numbers), "patches", **options), strict=True))

    def counted(chosen: np.ndarray) -> Counted:
        return Counted.of([rows[i] for i in chosen], [groups[i] for i in chosen])

    real = {label: counted(chosen) for label, chosen in by_class.items()}
    return real, Scored(counted(with_score), patches.scores_towards(ends[1], with_score)) if len(with_score) else None


def count_trajectory(folder: Path, groups: dict[str, str], **options) -> tuple[list[str], Counted]:
    """The source ids of a trajectory folder, and the nuclei of all frames, which are read as they are counted.

    `groups` are by source id; a source without one is a group of its own.
    """
    ids: list[str] = []

    def sequences() -> Iterator[np.ndarray]:
        for batch in iter_trajectory(folder, batch_size=16):
            _require_rgb(batch.frames.shape[2], f"{folder}: frames of")
            ids.extend(batch.source_ids)
            yield from (batch.sequence(b) for b in range(len(batch.source_ids)))

    rows = list(progress(count_arrays(sequences(), **options), desc=f"nuclei of {folder.name}", unit="sequence"))
    if not rows:
        raise UserError(f"{folder}: no whole sequence to count in; let `cellflux-bridge translate` finish first")
    found = Counted.of(rows, [groups.get(source, source) for source in ids])
    found.require_some(of=f"{folder}: its sources")
    return ids, found


def _first_frames(folders: Sequence[Path]) -> Iterator[np.ndarray]:
    """Frames (B, H, W, 3), of every level, of the first sources of each trajectory: enough to tell a scale by."""
    for folder in folders:
        for batch in islice(iter_trajectory(folder, batch_size=_SOURCES_FOR_SCALE), 1):
            _require_rgb(batch.frames.shape[2], f"{folder}: frames of")
            yield from (batch.sequence(b) for b in range(len(batch.source_ids)))


def _require_one_size(folders: Sequence[Path]) -> None:
    """UserError where trajectories, whose frames then have one unknown scale, differ in their frames' size."""
    sized = [(folder, frames.shape[1:3]) for folder in folders for frames in islice(_first_frames([folder]), 1)]
    for folder, size in sized:
        first, wanted = sized[0]
        if size != wanted:
            raise UserError(
                f"{folder}: frames of {size[1]} x {size[0]} px, but {first} has {wanted[1]} x {wanted[0]}; "
                "count them apart, or give --mpp"
            )


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

    Real patches come from the test split of `patches`, which also give the sources' groups, or from `real_folders`
    (source, target), or are left out. `mpp` is microns per pixel of frames and real patches (None: that of the
    trajectories). Raises UserError for trajectories of two transitions or scales, for frames that are not RGB, and
    where all sources, or all real patches of a class, are grey or inverted; single such images are left out and, in
    trajectories, counted as `unmeasured`.
    """
    parameters = Parameters() if parameters is None else parameters
    headers = [read_header(folder) for folder in folders]
    ends = headers[0].source, headers[0].target
    for folder, header in zip(folders, headers, strict=True):
        if (header.source, header.target) != ends:
            raise UserError(f"{folder}: {header.source} -> {header.target}, but {folders[0]} is {ends[0]} -> {ends[1]}")
    mpp = _scale(folders, headers) if mpp is None else mpp
    if mpp is None:
        _require_one_size(folders)
    scale = network_scale(_first_frames(folders), mpp=mpp, parameters=parameters)
    options = {"mpp": mpp, "parameters": parameters, "scale": scale, "workers": workers}
    real, scored, groups = {}, None, {}
    if patches is not None:
        groups = {id_: patches.group_names[number] for id_, number in zip(patches.ids, patches.groups, strict=True)}
    if real_folders is not None:
        real = {label: _count_folder(of, label, **options) for label, of in zip(ends, real_folders, strict=True)}
    elif patches is not None:
        real, scored = _count_patches(patches, ends, **options)
    for label, of_class in real.items():
        of_class.require_some(of=f"real {label} patches")
    trajectories = []
    for folder, header in zip(folders, headers, strict=True):
        ids, counted = count_trajectory(folder, groups, **options)
        shown, refused = counted.split_by_size()
        beside = (real[ends[0]], real[ends[1]], scored) if real else None
        trajectories.append(
            {
                "trajectory": str(folder),
                **{key: getattr(header, key) for key in ("method", "source", "target", "config_hash", "levels")},
                "n": len(ids),
                "median_area": counted.median_area,
                "incomplete": count_incomplete(folder),
                "unmeasured": int(np.isnan(counted.values[..., QUANTITIES.index("area_fraction")]).sum()),
                "refused": refused,
                "counter_error": (errors := relative_errors(parameters, counted.median_area)),
                "curves": means(counted, header.levels, seed=seed, errors=errors),
                "spearman": correlations(counted, header.levels, seed=seed),
                "checks": checks(counted, header.levels, *beside, seed=seed) if beside else [],
                "per_source": [
                    {"source_id": source, **{name: values[:, QUANTITIES.index(name)].tolist() for name in shown}}
                    for source, values in zip(ids, counted.values, strict=True)
                ],
            }
        )

    def real_means(of: Counted, level: float | None) -> list[dict[str, Any]]:
        return means(of, [level], seed=seed, errors=relative_errors(parameters, of.median_area))

    real_rows = [(label, row) for label, of_class in real.items() for row in real_means(of_class, None)]
    levels = sorted({level for header in headers for level in header.levels}) if scored else []
    content = {
        "format": FORMAT,
        "mpp": mpp,
        "scale": scale and scale._asdict(),
        "seed": seed,
        "parameters": asdict(parameters),
        "trajectories": trajectories,
        "real": [{"class": label, **{k: v for k, v in row.items() if k != "level"}} for label, row in real_rows],
        "real_by_level": [row for level in levels for row in real_means(scored.of_level(level), level)],
    }
    return without_nan(content)

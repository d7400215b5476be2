"""A trajectory folder read by the run that completes it and by whatever judges or shows its sequences.

    trajectory.json     what was made: method, source, target, classes, levels, config hash; mpp, where it is known
    manifest.csv        one row a frame: file, source_id, level, nfe and gradients of its sequence, depth (of methods
                        that have depths), p_<class> for each class
    frames/             <running number>_<source stem>/<frame>.png; .npy (H, W, C) uint8 where C is not 3

The folder may come from somebody else: nothing outside it is read, and sizes are checked before memory is taken.
"""

import math
import os
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import mapped, regular
from cellflux_bridge.images import UnreadableImage, read_rgb, read_size
from cellflux_bridge.trajectory.header import Trajectory, TrajectoryHeader, inside, read_header
from cellflux_bridge.trajectory.manifest import Frame, read_whole

# Of frames: what is loaded at most, and what a batch of `iter_trajectory` holds at most (but one sequence at least).
_MAX_BYTES, _BATCH_BYTES = 2**34, 2**30
_PNG_END = b"IEND\xaeB`\x82"


def read_sequences(folder: Path, header: TrajectoryHeader) -> tuple[list[list[Frame]], int]:
    """The whole sequences of every process, in the run's order, and the number of sources without a whole one."""
    whole: dict[str, list[Frame]] = {}
    named: set[str] = set()
    for path in sorted(folder.glob("manifest*.csv")):
        found, sources = read_whole(inside(folder, path.name), header)
        whole |= found
        named |= sources
    return sorted(whole.values(), key=lambda frames: frames[0].file), len(named - whole.keys())


def read_source_ids(folder: Path) -> tuple[str, ...]:
    """The sources of a folder's whole sequences, in the run's order, without a look at their frames."""
    return tuple(frames[0].source_id for frames in read_sequences(folder, read_header(folder))[0])


def iter_frames(folder: Path) -> Iterator[Frame]:
    """The rows of every frame of a folder's whole sequences; no pixel is read."""
    for frames in read_sequences(folder, read_header(folder))[0]:
        for frame in frames:
            _path(folder, frame)  # refuses a file outside the folder
            yield frame


def count_incomplete(folder: Path) -> int:
    """How many sources have some rows in a folder's manifest, but not one for each level; readers leave them out."""
    return read_sequences(folder, read_header(folder))[1]


def load_trajectory(
    folder: Path, *, start: int = 0, num: int | None = None, source_ids: Collection[str] | None = None
) -> Trajectory:
    """The sequences `start` to `start + num` (all by default) of a trajectory folder, in the run's order; of those of
    `source_ids` alone, where they are given.

    Raises UserError for a folder without sequences, that is damaged or names files outside it, for frames that are
    missing, unreadable or of another size, and for more than 16 GiB of frames.
    """
    header = read_header(folder)
    chosen, _ = read_sequences(folder, header)
    if source_ids is not None:
        chosen = [frames for frames in chosen if frames[0].source_id in source_ids]
    chosen = chosen[start : None if num is None else start + num]
    if not chosen:
        raise UserError(f"{folder}: holds no whole sequence from number {start} on")
    return _load(folder, header, chosen)


def iter_trajectory(folder: Path, *, batch_size: int = 64) -> Iterator[Trajectory]:
    """The sequences of a folder in batches of `batch_size` or of 1 GiB, so that memory stays flat."""
    header = read_header(folder)
    sequences, _ = read_sequences(folder, header)
    if sequences:
        of_one = len(header.levels) * math.prod(_shape(_path(folder, sequences[0][0])))
        batch_size = max(1, min(batch_size, _BATCH_BYTES // of_one))
    for start in range(0, len(sequences), batch_size):
        yield _load(folder, header, sequences[start : start + batch_size])


def _load(folder: Path, header: TrajectoryHeader, sequences: list[list[Frame]]) -> Trajectory:
    paths = [[_path(folder, frame) for frame in sequence] for sequence in sequences]
    height, width, channels = shape = _shape(paths[0][0])
    whole = (len(header.levels), len(sequences), channels, height, width)
    if math.prod(whole) > _MAX_BYTES:
        raise UserError(
            f"{folder}: {len(sequences)} sequences of {len(header.levels)} frames of {width} x {height} pixels are "
            f"more than the {_MAX_BYTES // 2**30} GiB that are loaded; read them in parts"
        )
    for path in chain.from_iterable(paths):  # before any frame is decoded
        if (found := _shape(path)) != shape:
            raise UserError(f"{path}: {found[1]} x {found[0]} pixels, {found[2]} channels, unlike the others")
    frames = np.empty(whole, np.uint8)
    for (b, k), path in np.ndenumerate(paths):
        image = _open_array(path) if path.suffix == ".npy" else read_rgb(path)
        frames[k, b] = image.transpose(2, 0, 1)
    depths = np.array([[frame.depth for frame in sequence] for sequence in sequences], float).T  # None becomes NaN
    labels = np.array([[frame.soft_label for frame in sequence] for sequence in sequences], np.float32)
    first = [sequence[0] for sequence in sequences]
    columns = (tuple(getattr(frame, name) for frame in first) for name in ("source_id", "nfe", "gradients"))
    depths = None if np.isnan(depths).all() else depths
    return Trajectory(header, frames, labels.transpose(1, 0, 2), *columns, depths)


def _path(folder: Path, frame: Frame) -> Path:
    return inside(folder, frame.file, where=f"{folder}, manifest, line {frame.line}: ")


def is_whole(path: Path) -> bool:
    """Whether a frame's file is there to its end; its pixels are not decoded."""
    try:
        if path.suffix == ".npy":
            _open_array(path)
            return True
        with open(regular(path), "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except (OSError, UserError):
        return False


def _shape(path: Path) -> tuple[int, int, int]:
    """(H, W, C) of a frame, from its file's header."""
    return _open_array(path).shape if path.suffix == ".npy" else (*read_size(path), 3)


def _open_array(path: Path) -> np.ndarray:
    """A .npy file as an array that is read from the disk when it is used; no pickle is loaded."""
    try:
        array = mapped(path)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"truncated or no array ({error})"
        raise UnreadableImage(f"{path}: {reason}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or not array.size:
        raise UnreadableImage(f"{path}: {array.dtype} {array.shape}: expected uint8 (H, W, C)")
    return array

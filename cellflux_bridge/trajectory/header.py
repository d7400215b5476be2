"""Trajectory, the core data format: sequences of finished images from A to B."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular
from cellflux_bridge.base.locks import writing

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

HEADER, FORMAT = "trajectory.json", 2
# A folder may come from somebody else: a larger header is refused before it is read.
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class TrajectoryHeader:
    """What all sequences of a trajectory share.

    `method` is "path" (states of the flow's ODE), "progression", "depth" or "ddim"; `levels` are K+1 rising numbers in
    [0, 1], 0 the source and 1 the target; `config_hash` is a hash of the settings @ step : hash of the network's
    weights, + the same of every guide; `mpp` is microns per pixel of the frames, None where they are not known.
    """

    method: str
    source: str
    target: str
    classes: tuple[str, ...]
    levels: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)]
    config_hash: str
    mpp: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, repr=False)
class Trajectory:
    """B sequences of K+1 frames, the first of which is the source patch itself.

    frames (K+1, B, C, H, W) uint8; soft_labels (K+1, B, num_classes) float32, rows sum to 1; source_ids (B,) text; nfe
    and gradients (B,) count network forwards and classifier gradients of a sequence. depths (K+1, B) float, of methods
    that go back towards noise: how far, in the method's own unit (respaced steps for "ddim", 1 - t for "depth"), 0 for
    frame 0; None for other methods, and NaN for sequences that were written without them.
    """

    header: TrajectoryHeader
    frames: np.ndarray
    soft_labels: np.ndarray
    source_ids: tuple[str, ...]
    nfe: tuple[int, ...]
    gradients: tuple[int, ...]
    depths: np.ndarray | None = None

    def __post_init__(self):
        expected = (len(self.header.levels), len(self.source_ids))
        assert self.frames.dtype == np.uint8
        assert self.frames.shape[:2] == expected, self.frames.shape
        assert self.soft_labels.shape == (*expected, len(self.header.classes)), self.soft_labels.shape
        assert len(self.nfe) == len(self.gradients) == len(self.source_ids)
        assert self.depths is None or self.depths.shape == expected, self.depths.shape

    @property
    def levels(self) -> tuple[float, ...]:
        return self.header.levels

    def sequence(self, index: int) -> np.ndarray:
        """The frames of one source as images, (K+1, H, W, C) uint8."""
        return self.frames[:, index].transpose(0, 2, 3, 1)

    def soft_labels_of(self, label: str) -> np.ndarray:
        """The share of class `label` in the soft labels, (K+1, B) float32; UserError for another name."""
        if label not in self.header.classes:
            raise UserError(f"{label!r}: no class of this trajectory; its classes are {', '.join(self.header.classes)}")
        return self.soft_labels[..., self.header.classes.index(label)]

    def save(self, folder: str | Path) -> Path:
        """Write the sequences into a folder, new or of the same translation, that `load` and all commands read."""
        from cellflux_bridge.trajectory.writer import TrajectoryWriter

        folder = Path(folder)
        with writing(folder):
            writer = TrajectoryWriter(folder, self.header)
            start, new = len(writer.done), [b for b, name in enumerate(self.source_ids) if name not in writer.done]
            if new:
                writer.append(self._of(new), numbers=range(start, start + len(new)))
            writer.finish()
        return folder

    @staticmethod
    def load(folder: str | Path) -> "Trajectory":
        """The sequences of a trajectory folder; errors as of `load_trajectory`."""
        from cellflux_bridge.trajectory.reader import load_trajectory

        return load_trajectory(Path(folder))

    def strip(self, path: str | Path | None = None, *, sequences: int = 8, tile: int = 96) -> "Image":
        """A still picture, a row a sequence, as a PIL image; written to `path` too, where one is given (.png)."""
        from PIL import Image

        from cellflux_bridge.images import write_png
        from cellflux_bridge.images.panels import draw_strip

        picture = draw_strip(self, sequences=sequences, tile=tile, caption=True)
        if path is not None:
            write_png(Path(path), picture)
        return Image.fromarray(picture)

    def video(self, path: str | Path, **settings) -> Path:
        """Write a video (.mp4, .webp or .gif); `settings` are keys of the section `video` of a configuration."""
        from cellflux_bridge.video.encode import write_video

        write_video(self, Path(path), **settings)
        return Path(path)

    def to_dataframe(self) -> "DataFrame":
        """A pandas table with one row a frame: source_id, level, p_<class> of each class, nfe, gradients, depth."""
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise UserError("to_dataframe: pandas is not installed; run: pip install pandas") from error
        shape, num = self.frames.shape[:2], self.frames.shape[0]
        columns = {
            "source_id": np.tile(self.source_ids, num),
            "level": np.repeat(self.levels, shape[1]),
            **{f"p_{label}": self.soft_labels_of(label).ravel() for label in self.header.classes},
            **{name: np.tile(getattr(self, name), num) for name in ("nfe", "gradients")},
            "depth": np.full(shape, np.nan).ravel() if self.depths is None else self.depths.ravel(),
        }
        return DataFrame(columns)

    def __repr__(self) -> str:
        (levels, num, channels, height, width), header = self.frames.shape, self.header
        return (
            f"Trajectory({header.source} -> {header.target}, {header.method}: {num} sequences of {levels} frames, "
            f"{channels} x {height} x {width})"
        )

    def _repr_html_(self) -> str:
        from cellflux_bridge.trajectory.notebook import slider

        return slider(self)

    def _of(self, numbers: Sequence[int]) -> "Trajectory":
        """The sequences of these numbers."""
        depths = None if self.depths is None else self.depths[:, numbers]
        parts = (tuple(getattr(self, name)[b] for b in numbers) for name in ("source_ids", "nfe", "gradients"))
        return Trajectory(self.header, self.frames[:, numbers], self.soft_labels[:, numbers], *parts, depths)

    @staticmethod
    def cat(parts: "Sequence[Trajectory]") -> "Trajectory":
        """Sequences of the same run joined along the batch."""
        depths = [np.full(part.frames.shape[:2], np.nan) if part.depths is None else part.depths for part in parts]
        return Trajectory(
            parts[0].header,
            *(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("frames", "soft_labels")),
            *(sum((getattr(part, name) for part in parts), ()) for name in ("source_ids", "nfe", "gradients")),
            None if all(part.depths is None for part in parts) else np.concatenate(depths, axis=1),
        )


def between(source: int, target: int, levels: np.ndarray, num_classes: int) -> np.ndarray:
    """Soft labels (K, num_classes) float32 of levels (K,) between two classes: 1 - s for the one, s for the other."""
    labels = np.zeros((len(levels), num_classes), np.float32)
    labels[:, source] = 1 - np.asarray(levels)
    labels[:, target] += np.asarray(levels)
    return labels


def linear_soft_labels(header: TrajectoryHeader, num_sequences: int) -> np.ndarray:
    """Soft labels (K+1, B, num_classes) that move from the source class to the target class with the level."""
    source, target = header.classes.index(header.source), header.classes.index(header.target)
    labels = between(source, target, np.asarray(header.levels), len(header.classes))
    return np.repeat(labels[:, None], num_sequences, axis=1)


def inside(folder: Path, name: str, *, where: str = "") -> Path:
    """The file `name` of a folder; UserError where it lies outside (an absolute name, .., a symbolic link).

    `where` is the place of the name, for the error.
    """
    path = folder / name
    try:
        if ".." not in PurePath(name).parts and path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL in the name
        pass
    raise UserError(f"{where}{name!r}: leads out of the trajectory {folder}; expected a file below it, without links")


def read_limited(path: Path, *, most: int) -> bytes:
    """A file's bytes; UserError for one of more than `most`, before it is read, and for one that cannot be read."""
    try:
        if regular(path).stat().st_size > most:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than the {most:,} that are read")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: no {path.name} here; expected a folder that `translate` wrote") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_header(folder: Path) -> TrajectoryHeader:
    """What `trajectory.json` of a folder says; UserError names the file and what is wrong with it."""
    path = inside(folder, HEADER)
    text = read_limited(path, most=_MAX_BYTES)
    try:
        data = json.loads(text)
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != FORMAT:
            raise ValueError(f"expected a mapping of format {FORMAT}, found {found!r:.80}")
        header = TypeAdapter(TrajectoryHeader).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}, found {first['input']!r:.80}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for is_right, expected in (
        (list(header.levels) == sorted(set(header.levels)), "levels: expected numbers that rise"),
        (len(set(header.classes)) == len(header.classes), "classes: expected different labels"),
        ({header.source, header.target} <= set(header.classes), "source and target: expected labels of its classes"),
    ):
        if not is_right:
            raise UserError(f"{path}: {expected}")
    return header

"""Trajectory, the core data format: sequences of finished images from A to B."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError

HEADER, MANIFEST, FORMAT = "trajectory.json", "manifest.csv", 2


@dataclass(frozen=True)
class TrajectoryHeader:
    """What all sequences of a trajectory share.

    `method` is "path" (states of the flow's ODE), "progression" or "depth" (stairs) or "ddim"; `levels` are
    K+1 rising numbers in [0, 1], 0 the source and 1 the target; `config_hash` tells settings and weights from others: a
    hash of the settings @ step : hash of the network's weights, + the same of every guide; `mpp` is microns per pixel
    of the frames, None where they are not known.
    """

    method: str
    source: str
    target: str
    classes: tuple[str, ...]
    levels: tuple[float, ...]
    config_hash: str
    mpp: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """B sequences of K+1 frames.

    frames (K+1, B, C, H, W) uint8; levels (K+1,) float; soft_labels (K+1, B, num_classes) float32, rows sum to 1;
    source_ids (B,) text; nfe (B,) network forwards and gradients (B,) classifier gradients that a sequence took, summed
    over its levels; frame 0 is the source patch itself.
    """

    header: TrajectoryHeader
    frames: np.ndarray
    soft_labels: np.ndarray
    source_ids: tuple[str, ...]
    nfe: tuple[int, ...]
    gradients: tuple[int, ...]

    def __post_init__(self):
        expected = (len(self.header.levels), len(self.source_ids))
        assert self.frames.dtype == np.uint8
        assert self.frames.shape[:2] == expected, self.frames.shape
        assert self.soft_labels.shape == (*expected, len(self.header.classes)), self.soft_labels.shape
        assert len(self.nfe) == len(self.gradients) == len(self.source_ids)

    @property
    def levels(self) -> tuple[float, ...]:
        return self.header.levels

    def sequence(self, index: int) -> np.ndarray:
        """The frames of one source as images, (K+1, H, W, C) uint8."""
        return self.frames[:, index].transpose(0, 2, 3, 1)

    @staticmethod
    def cat(parts: "Sequence[Trajectory]") -> "Trajectory":
        """Sequences of the same run joined along the batch."""
        return Trajectory(
            parts[0].header,
            np.concatenate([part.frames for part in parts], axis=1),
            np.concatenate([part.soft_labels for part in parts], axis=1),
            tuple(source_id for part in parts for source_id in part.source_ids),
            tuple(count for part in parts for count in part.nfe),
            tuple(count for part in parts for count in part.gradients),
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


def read_header(folder: Path) -> TrajectoryHeader:
    """What `trajectory.json` of a folder says; UserError names the file and what is wrong with it."""
    path = folder / HEADER
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {HEADER} here; expected a folder that `translate` wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    wanted = {f.name for f in fields(TrajectoryHeader)}
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT or set(data) | {"mpp"} != wanted:
        raise UserError(f"{path}: expected format {FORMAT} with the keys {', '.join(sorted(wanted))}")
    if not all(isinstance(data[key], list) for key in ("classes", "levels")):
        raise UserError(f"{path}: expected lists of classes and levels")
    if (mpp := data.get("mpp")) is not None and not (isinstance(mpp, (int, float)) and mpp > 0):
        raise UserError(f"{path}: mpp {mpp!r}: expected microns per pixel, above 0, or null")
    data["classes"], data["levels"] = tuple(data["classes"]), tuple(data["levels"])
    return TrajectoryHeader(**data)

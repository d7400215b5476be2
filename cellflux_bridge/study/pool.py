"""The made images of an arm: from trajectories or a folder, labelled, selected."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.study.settings import ArmConfig
from cellflux_bridge.trajectory import iter_trajectory, read_header

# uint8 patches (N, 3, S, S) -> features (N, D) and calibrated probabilities (N, num_classes)
Look = Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]]
_BATCH = 64


class Pool(NamedTuple):
    """Made images: patches (N, 3, S, S) uint8 and their soft labels (N, num_classes) float32."""

    patches: torch.Tensor
    labels: np.ndarray


def candidates(
    folders: Sequence[Path], arm: ArmConfig, *, classes: Sequence[str], preprocessing: Preprocessing
) -> Pool:
    """All images that an arm may take: frames of trajectory folders at its levels, or of folders root/<class>/*.

    Raises UserError for a trajectory of other classes or another size, and for a folder without one of the classes.
    """
    parts, size = [], preprocessing.image_size
    for folder in folders:
        if not (folder / "trajectory.json").exists():
            parts += _of_class_folders(folder, classes, preprocessing)
            continue
        header = read_header(folder)
        if header.classes != tuple(classes):
            raise UserError(
                f"{folder}: a trajectory of classes {', '.join(header.classes)}; this study has {', '.join(classes)}"
            )
        levels = np.arange(len(header.levels))
        levels = {"inner": levels[1:-1], "ends": levels[-1:], "all": levels[1:]}[arm.levels]
        if not len(levels):
            raise UserError(f"{folder}: has no level between its ends; set levels=ends for arms of this generator")
        for trajectory in iter_trajectory(folder, batch_size=_BATCH):
            frames = trajectory.frames[levels]
            if frames.shape[2:] != (3, size, size):
                found = "x".join(map(str, frames.shape[2:]))
                raise UserError(f"{folder}: frames of {found}, the study has 3x{size}x{size}")
            labels = trajectory.soft_labels[levels].reshape(-1, len(classes))
            parts.append(Pool(torch.from_numpy(frames.reshape(-1, *frames.shape[2:])), labels))
    if not parts:
        raise UserError(f"{', '.join(map(str, folders))}: hold no image")
    return Pool(torch.cat([part.patches for part in parts]), np.concatenate([part.labels for part in parts]))


def _of_class_folders(folder: Path, classes: Sequence[str], preprocessing: Preprocessing) -> list[Pool]:
    parts = []
    for number, label in enumerate(classes):
        files = image_files(folder / label) if (folder / label).is_dir() else []
        if not files:
            raise UserError(f"{folder / label}: holds no image; a folder of made images is root/<class>/*")
        patches = np.stack([ready_patch(file, preprocessing) for file in files])
        labels = np.eye(len(classes), dtype=np.float32)[np.full(len(files), number)]
        parts.append(Pool(torch.from_numpy(patches.transpose(0, 3, 1, 2).copy()), labels))
    return parts


def ready_patch(file: Path, preprocessing: Preprocessing) -> np.ndarray:
    """A made image (S, S, 3) uint8: as it is where it has the network's size, else scaled and cropped as files are."""
    rgb, size = images.read_rgb(file), preprocessing.image_size
    return rgb if rgb.shape[:2] == (size, size) else preprocessing(rgb, name=str(file))


def choose(
    pool: Pool,
    arm: ArmConfig,
    *,
    num_real: int,
    classes: Sequence[str],
    centroids: np.ndarray | None,
    look: Look | None,
    generator: np.random.Generator,
) -> Pool:
    """The images of a pool that an arm trains on: `ratio` times `num_real`, as many on the side of each class.

    An image stands on the side of the class with the larger share of its label; of equal shares, on that of its nearest
    centroid, or at random. "random" draws. "centroid" (HistoDiffusion, arXiv 2308.04020) keeps images whose nearest
    centroid (`centroids` (num_classes, D), of real training images' features) is that of their side, and takes the
    nearest first; "confidence" the ones first of which the classifier is surest. `look` is needed for both, and for
    labels=classifier. Raises UserError for a side that runs short, with the number that it lacks.
    """
    labels, wanted = pool.labels, round(arm.ratio * num_real / len(classes))
    if wanted == 0:
        least = len(classes) / (2 * num_real)
        raise UserError(
            f"ratio={arm.ratio:g}: of {num_real} real images that is none a class; raise it above {least:.2g}"
        )
    features = probabilities = None
    if arm.select != "random" or arm.labels == "classifier":
        features, probabilities = look(pool.patches)
    labels = probabilities if arm.labels == "classifier" else labels
    rows = np.arange(len(labels))
    side = (labels + 1e-6 * generator.random(labels.shape)).argmax(1)
    rank, kept = generator.random(len(labels)), np.ones(len(labels), bool)
    if arm.select != "random":
        distance = np.linalg.norm(features[:, None] - centroids, axis=2)
        nearest, top = distance.argmin(1), labels.max(1, keepdims=True)
        is_tie = (labels >= top - 1e-6).sum(1) > 1
        side = np.where(is_tie, nearest, labels.argmax(1))
        kept = nearest == side
        rank = distance[rows, side] if arm.select == "centroid" else -probabilities[rows, side]
    chosen = []
    for number, label in enumerate(classes):
        members = rows[kept & (side == number)]
        if len(members) < wanted:
            made = (side == number).sum()
            raise UserError(
                f"ratio={arm.ratio:g}: {wanted} made images of class {label!r} are needed, {len(members)} can be used "
                f"(of {made} made): {wanted - len(members)} are missing. Make more sequences or levels, or lower ratio"
            )
        chosen.append(members[np.argsort(rank[members], kind="stable")[:wanted]])
    chosen = np.sort(np.concatenate(chosen))
    return Pool(pool.patches[torch.from_numpy(chosen)], labels[chosen].astype(np.float32))

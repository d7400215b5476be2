"""How many frames a classifier assigns to the target class, level by level."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images.stain import fit_reference
from cellflux_bridge.metrics.structure import recolour
from cellflux_bridge.trajectory import Trajectory


@dataclass(frozen=True)
class FlipRate:
    """Per level of a trajectory: the fraction of frames whose most probable class is the target, and the mean
    probability of the target; `reinhard` is the same fraction for a mere colour transfer of the sources."""

    levels: tuple[float, ...]
    fraction: tuple[float, ...]
    probability: tuple[float, ...]
    reinhard: float
    num_sequences: int


def flip_rate(
    batches: Iterable[Trajectory],
    predict: Callable[[torch.Tensor], np.ndarray],
    *,
    classes: tuple[str, ...],
    real_targets: np.ndarray,
) -> FlipRate:
    """Judge a trajectory with `predict`, which maps uint8 patches (N, 3, H, W) to probabilities (N, num_classes).

    `classes` is the classifier's own order. `real_targets` (N, H, W, 3) uint8 are real patches of the target class,
    to whose mean colour statistics each source is transferred (Reinhard et al. 2001) for comparison.
    """
    reference = fit_reference("reinhard", list(real_targets))
    hits, probabilities, recoloured = [], [], []
    for batch in batches:
        target = classes.index(batch.header.target)
        k, b = batch.frames.shape[:2]
        p = predict(torch.from_numpy(batch.frames.reshape(k * b, *batch.frames.shape[2:]))).reshape(k, b, -1)
        hits.append(p.argmax(2) == target)
        probabilities.append(p[:, :, target])
        sources = np.ascontiguousarray(recolour(batch.frames[0], reference))
        recoloured.append(predict(torch.from_numpy(sources)).argmax(1) == target)
    if not hits:
        raise UserError("no whole sequence to judge; let `cellflux-bridge translate` finish first")
    hits, probabilities = np.concatenate(hits, axis=1), np.concatenate(probabilities, axis=1)
    return FlipRate(
        levels=batch.levels,
        fraction=tuple(hits.mean(1).tolist()),
        probability=tuple(probabilities.mean(1).tolist()),
        reinhard=float(np.concatenate(recoloured).mean()),
        num_sequences=hits.shape[1],
    )

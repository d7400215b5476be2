"""Whether frames repeat training patches: distances to the nearest ones, beside those of held-out real patches.

Only the comparison counts: real patches of one tissue lie near each other, too. Blurred or average images lie near many
patches without repeating one, and a network's features may hold copies apart. So near copies are listed to be looked
at, not only counted.
"""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import pairwise_distances_argmin

from cellflux_bridge.metrics.networks import Network

# Up to this distance, as a share of the typical length of features, two images are one: float32 rounds by as much.
_ROUNDING = 1e-5


class NearestTraining(NamedTuple):
    """The nearest training patches of L levels of N sequences: their distances, numbers and classes `kinds` (1 for the
    target), each (L, N). `held_out`: for either class the sorted distances of the held-out patches whose nearest
    training patch is of that class, because one tissue may lie far denser than the other. Images no farther apart than
    `same` are one image.
    """

    distances: np.ndarray
    numbers: np.ndarray
    kinds: np.ndarray
    held_out: list[np.ndarray]
    same: float = 0.0

    def ratio(self, chosen: np.ndarray) -> np.ndarray:
        """Distance of the chosen frames over the median of held-out patches, median over frames, (L,)."""
        medians = np.array([np.median(held_out) for held_out in self.held_out])
        return np.median(self.distances[:, chosen] / medians[self.kinds[:, chosen]], axis=1)

    def closer(self) -> np.ndarray:
        """(L, N): the share of held-out patches that lie farther from training than the frame, a tie for a half; its
        mean is the Mann-Whitney statistic, 0.5 where frames and held-out patches are alike (Meehan et al. 2020)."""
        d = self.distances
        below = [(np.searchsorted(h, d) + np.searchsorted(h, d, "right")) / (2 * len(h)) for h in self.held_out]
        return np.where(np.isnan(self.least()), np.nan, 1 - np.where(self.kinds == 1, below[1], below[0]))

    def least(self) -> np.ndarray:
        """(L, N): the least distance of the held-out patches that each frame is compared to."""
        return np.array([held_out[0] for held_out in self.held_out])[self.kinds]

    def is_near_copy(self) -> np.ndarray:
        """(L, N): nearer than every held-out patch, as 1 in M + 1 of real ones would be, or a training patch itself."""
        return (self.distances < self.least()) | (self.distances <= self.same)


def nearest(x: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N,) of features (N, D) to their nearest of others (M, D), and its numbers; memory stays flat."""
    numbers = pairwise_distances_argmin(np.ascontiguousarray(x), others)
    # Exact for a copy, whose expanded square is not.
    return np.linalg.norm(np.asarray(x, np.float64) - others[numbers], axis=1), numbers


class Training:
    """The training patches of both classes in the extractor's features, beside features (M, D) of real test patches.

    `held_out` and `num_repeated` are those of `held_out_distances`: beside a test patch that repeats a training patch
    nothing could lie nearer than held-out patches.
    """

    def __init__(self, extractor: Network, real_features: np.ndarray):
        patches = extractor.patches
        numbers = np.concatenate([patches.indices("train", label) for label in (extractor.source, extractor.target)])
        self.ids = [patches.ids[i] for i in numbers]
        self.features = extractor.outputs_of_patches(patches, numbers, desc="training patches").features
        self.is_target = patches.labels[numbers] == patches.class_index(extractor.target)
        self.same = _ROUNDING * float(np.median(np.linalg.norm(self.features, axis=1)))
        self.held_out, self.num_repeated = held_out_distances(
            real_features, self.features, self.is_target, same=self.same
        )

    def nearest_to(self, frames: np.ndarray) -> NearestTraining:
        """Of features (N, L, D) of frames."""
        found = [nearest(level, self.features) for level in frames.swapaxes(0, 1)]
        distances, numbers = map(np.stack, zip(*found, strict=True))
        return NearestTraining(distances, numbers, self.is_target[numbers].astype(int), self.held_out, self.same)


def held_out_distances(
    real: np.ndarray, training: np.ndarray, is_target: np.ndarray, *, same: float
) -> tuple[list[np.ndarray], int]:
    """Sorted distances of real features (M, D) to their nearest of `training` (T, D), by the class of these, and how
    many are left out because they are no farther than `same`; NaN where none is left."""
    distances, found = nearest(real, training)
    differs = distances > same
    distances, kinds = distances[differs], is_target[found[differs]]
    every = distances if len(distances) else np.array([np.nan])
    # A class that no held-out patch lies nearest to has none of its own to compare to.
    by_class = [np.sort(distances[kinds == kind] if (kinds == kind).any() else every) for kind in (False, True)]
    return by_class, int((~differs).sum())

"""Whether frames repeat what was trained on: their nearest training patches, beside those of held-out real patches.

Only a comparison tells: real patches of one tissue lie near each other, too. Blurred or average images lie near many
patches without repeating one, and a network's features may hold copies apart, so near copies are listed to be looked
at, not counted alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cellflux_bridge.metrics.manifold import squared_distances
from cellflux_bridge.metrics.networks import Network

_BLOCK, _OTHERS = 512, 16384  # rows and columns of the distances that are in memory at once
# Distance, as a share of a training patch's typical length in features, up to which two images are the same one: what
# the rounding of float32 features comes to.
_ROUNDING = 1e-5


class NearCopy(NamedTuple):
    """A frame that repeats a training patch, or lies nearer to it than any held-out real patch does to its own nearest
    of that class: `distance` < `held_out`, the least of theirs, both Euclidean in the extractor's features."""

    method: str
    trajectory: str
    source_id: str
    level: float
    training_id: str
    distance: float
    held_out: float

    @property
    def share(self) -> float:
        """`distance` over `held_out`, 0 for an exact copy: the smaller, the worse."""
        return self.distance / self.held_out if self.distance else 0.0


class NearestTraining(NamedTuple):
    """Of L levels and N sequences: distances (L, N) to the nearest training patch, whose numbers are (L, N) and classes
    `kinds` (L, N) int, and for either class the sorted distances of the held-out patches nearest to a patch of it;
    up to `same` apart, two images are one.

    Comparing within a class matters: one tissue may lie far denser than the other.
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
        shares = [
            1 - (np.searchsorted(h, d) + np.searchsorted(h, d, side="right")) / (2 * len(h)) for h in self.held_out
        ]
        shares = [np.where(np.isnan(h[0]), np.nan, share) for h, share in zip(self.held_out, shares, strict=True)]
        return np.where(self.kinds == 1, shares[1], shares[0])

    def least(self) -> np.ndarray:
        """(L, N): the least distance of the held-out patches that each frame is compared to."""
        return np.array([held_out[0] for held_out in self.held_out])[self.kinds]

    def is_near_copy(self) -> np.ndarray:
        """(L, N): nearer than every held-out patch, as 1 in M + 1 of real ones would be, or a training patch itself."""
        return (self.distances < self.least()) | (self.distances <= self.same)


def nearest(
    x: np.ndarray, others: np.ndarray, *, block: int = _BLOCK, others_block: int = _OTHERS
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N,) of features (N, D) to their nearest of others (M, D), and its numbers; in blocks of both."""
    x = np.asarray(x, np.float64)
    least, numbers = np.full(len(x), np.inf), np.zeros(len(x), int)
    for first in range(0, len(others), others_block):
        part = np.asarray(others[first : first + others_block], np.float64)
        part_squared = (part**2).sum(1)
        for start in range(0, len(x), block):
            rows = slice(start, start + block)
            squared = squared_distances(x[rows], part, part_squared)
            found = squared.argmin(1)
            squared = squared[np.arange(len(found)), found]
            nearer = squared < least[rows]
            least[rows][nearer], numbers[rows][nearer] = squared[nearer], first + found[nearer]
    return np.linalg.norm(x - others[numbers], axis=1), numbers  # exact for a copy, whose expanded square is not


@dataclass(frozen=True)
class Training:
    """The training patches of both classes in the extractor's features, whether each `is_target`, and of the real test
    patches the sorted distances to their nearest ones, of the source class and of the target class.

    The `num_repeated` test patches that repeat a training patch (no farther than `same`) are not among them: with one
    of them nothing could lie nearer than held-out patches.
    """

    ids: tuple[str, ...]
    features: np.ndarray
    is_target: np.ndarray
    held_out: list[np.ndarray]
    same: float
    num_repeated: int

    @staticmethod
    def look(extractor: Network, real_features: np.ndarray) -> "Training":
        patches = extractor.patches
        numbers = np.concatenate([patches.indices("train", label) for label in (extractor.source, extractor.target)])
        features = extractor.look_at_patches(patches, numbers, desc="training patches").features
        is_target = patches.labels[numbers] == patches.class_index(extractor.target)
        same = _ROUNDING * float(np.median(np.linalg.norm(features, axis=1)))
        held_out, num_repeated = held_out_distances(real_features, features, is_target, same=same)
        return Training(tuple(patches.ids[i] for i in numbers), features, is_target, held_out, same, num_repeated)

    def memory(self, frames: np.ndarray) -> NearestTraining:
        """Of frames (N, L, D)."""
        found = [nearest(level, self.features) for level in frames.swapaxes(0, 1)]
        distances, numbers = (np.stack(parts) for parts in zip(*found, strict=True))
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

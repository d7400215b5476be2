"""Whether frames repeat what was trained on: their nearest training patches, beside those of held-out real patches.

Only a comparison tells: real patches of one tissue lie near each other, too. Blurred or average images lie near many
patches without repeating one, and a network's features may hold copies apart, so near copies are listed to be looked
at, not counted alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cellflux_bridge.metrics.manifold import squared_distances
from cellflux_bridge.metrics.networks import Network, RealPatches

_BLOCK = 512


class NearCopy(NamedTuple):
    """A frame that lies nearer to a training patch than any held-out real patch of its class does to its own nearest:
    `distance` < `held_out`, the least of theirs, both Euclidean in the extractor's features."""

    method: str
    trajectory: str
    source_id: str
    level: float
    training_id: str
    distance: float
    held_out: float


class Memory(NamedTuple):
    """Of L levels and N sequences: distances (L, N) to the nearest training patch, whose numbers are (L, N), and for
    every level the sorted distances of held-out real patches to theirs."""

    distances: np.ndarray
    numbers: np.ndarray
    held_out: list[np.ndarray]

    def ratio(self, chosen: np.ndarray) -> np.ndarray:
        """Median distance of the chosen frames over that of held-out patches, (L,): below 1 is nearer than real."""
        return np.median(self.distances[:, chosen], axis=1) / [np.median(held_out) for held_out in self.held_out]

    def closer(self) -> np.ndarray:
        """(L, N): the share of held-out patches that lie farther from training than the frame, a tie for a half; its
        mean is the Mann-Whitney statistic, 0.5 where frames and held-out patches are alike (Meehan et al. 2020)."""
        pairs = zip(self.distances, self.held_out, strict=True)
        return np.stack(
            [1 - (np.searchsorted(h, d) + np.searchsorted(h, d, side="right")) / (2 * len(h)) for d, h in pairs]
        )

    def is_near_copy(self) -> np.ndarray:
        """(L, N): nearer than every held-out patch, as 1 in M + 1 of real patches would be."""
        return self.distances < np.array([held_out[0] for held_out in self.held_out])[:, None]


def nearest(x: np.ndarray, others: np.ndarray, *, block: int = _BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N,) of features (N, D) to their nearest of others (M, D), and its numbers; in blocks of rows."""
    x, others = np.asarray(x, np.float64), np.asarray(others, np.float64)
    numbers = [squared_distances(x[i : i + block], others).argmin(1) for i in range(0, len(x), block)]
    numbers = np.concatenate([np.empty(0, int), *numbers])
    return np.linalg.norm(x - others[numbers], axis=1), numbers  # exact for a copy, whose expanded square is not


@dataclass(frozen=True)
class Training:
    """The training patches of both classes in the extractor's features, `held_out` (M,) the distances of the real test
    patches to their nearest ones."""

    ids: tuple[str, ...]
    features: np.ndarray
    held_out: np.ndarray

    @staticmethod
    def look(extractor: Network, real: RealPatches, real_features: np.ndarray) -> "Training":
        patches = extractor.patches
        classes = (extractor.source, extractor.target)
        numbers = np.concatenate([patches.indices("train", label) for label in classes])
        features = extractor.look_at_patches(patches, numbers, desc="training patches").features
        return Training(tuple(patches.ids[i] for i in numbers), features, nearest(real_features, features)[0])

    def memory(self, frames: np.ndarray, like: Sequence[np.ndarray]) -> Memory:
        """Of frames (N, L, D); `like` are, level by level, the (M,) held-out patches that they are compared to."""
        found = [nearest(level, self.features) for level in frames.swapaxes(0, 1)]
        distances, numbers = (np.stack(parts) for parts in zip(*found, strict=True))
        return Memory(distances, numbers, [np.sort(self.held_out[chosen]) for chosen in like])

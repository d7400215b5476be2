"""Patches of a configuration, decoded once into a memory-mapped cache and drawn from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.cache import cached_pixels
from cellflux_bridge.data.index import list_records, patch_index
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import stain

__all__ = ["SCORE_WINDOW", "Patches", "list_records", "load_patches", "near_level"]

# A patch is of a level where its score differs by no more.
SCORE_WINDOW = 0.075


def near_level(scores: np.ndarray, level: float) -> np.ndarray:
    """Which scores (n,) are of a level, as (n,) bool."""
    return np.abs(scores - level) <= SCORE_WINDOW + 1e-6


@dataclass(frozen=True)
class Patches:
    """All patches of a data set at the network's scale, in the order of `ids`.

    `pixels` (N, H, W, C) uint8, memory-mapped, H and W at least image_size; `labels` (N,) int64 into `classes`;
    `splits` (N,) into SPLITS, 3 for none; `groups` (N,) int64, patches of one group sharing a number; `scores` (N,)
    float32, NaN where the data has none; `ids` the paths relative to the root; `batches` (N,) int64 into `batch_names`,
    -1 for none; `doses` (N,) float32, 0 for none.
    """

    pixels: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    group_names: tuple[str, ...]
    scores: np.ndarray
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    batches: np.ndarray
    batch_names: tuple[str, ...]
    doses: np.ndarray

    def indices(self, split: str, label: str | None = None) -> np.ndarray:
        """Numbers of the patches of a split, of one class or of all."""
        chosen = self.splits == SPLITS.index(split)
        if label is not None:
            chosen &= self.labels == self.class_index(label)
        return np.flatnonzero(chosen)

    def scores_towards(self, label: str, indices: np.ndarray) -> np.ndarray:
        """Scores (n,) that rise towards a class: 1 less the data's score, unless it is the last class."""
        scores = self.scores[indices]
        return scores if label == self.classes[-1] else 1 - scores

    def class_index(self, label: str) -> int:
        if label not in self.classes:
            raise UserError(f"no class {label!r} here{nearest(label, self.classes)}; known: {', '.join(self.classes)}")
        return self.classes.index(label)

    def sample(self, split: str, label: str | None = None, *, num: int | None, seed: int) -> np.ndarray:
        """At most `num` patches of a split (None: all), drawn by the seed; fewer are the beginning of more."""
        indices = self.indices(split, label)
        return numpy_generator(seed, "sample", split, str(label)).permutation(indices)[:num]

    def centre(self, indices: Sequence[int]) -> torch.Tensor:
        """The middle patch of each image: (B, C, S, S) uint8."""
        return self.cut(indices, self.middle_places(len(indices)))

    def random(self, indices: Sequence[int], *, flips: bool, generator: torch.Generator) -> torch.Tensor:
        """A random patch of each image, (B, C, S, S) uint8, with `flips` in one of the square's eight symmetries."""
        return self.cut(indices, self.random_places(len(indices), flips=flips, generator=generator))

    def middle_places(self, num: int) -> np.ndarray:
        """Where the middle patches of `num` images are: see `cut`."""
        size = self.preprocessing.image_size
        return np.tile([(self.pixels.shape[1] - size) // 2, (self.pixels.shape[2] - size) // 2, 0], (num, 1))

    def random_places(self, num: int, *, flips: bool, generator: torch.Generator) -> np.ndarray:
        """Where random patches of `num` images are, with `flips` in one of the square's eight symmetries: see `cut`."""
        size = self.preprocessing.image_size
        room = (self.pixels.shape[1] - size + 1, self.pixels.shape[2] - size + 1, 8 if flips else 1)
        return (torch.rand(num, 3, generator=generator).numpy() * room).astype(int)

    def cut(self, indices: Sequence[int], places: np.ndarray) -> torch.Tensor:
        """The patch of each image at a place, (B, C, S, S) uint8; `places` (B, 3) int64 hold top, left and symmetry:
        that many quarter turns, from 4 on of the mirrored patch."""
        size = self.preprocessing.image_size
        crops = []
        for index, (top, left, symmetry) in zip(indices, places, strict=True):
            crop = self.pixels[index, top : top + size, left : left + size]
            crops.append(np.rot90(crop if symmetry < 4 else crop[:, ::-1], symmetry % 4))
        return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def load_patches(
    config: DataConfig, *, seed: int, reference: stain.StainReference | None = None, build: bool = True
) -> Patches:
    """The patches of a configuration, from the cache, which is made first where it is missing or stale.

    The cache key covers every file's path, size and time of change and all settings that touch pixels, so a changed,
    added or removed file makes a new cache. Where stain is normalised, `reference` replaces that of the training
    split. Raises UserError that lists unreadable files, for a data.cache_dir that cannot be written to, and where the
    cache is missing and not to be built.
    """
    index = patch_index(config, seed=seed)
    pixels, preprocessing = cached_pixels(config, index, seed=seed, reference=reference, build=build)
    return Patches(
        pixels=pixels,
        ids=index.ids,
        labels=index.labels,
        splits=index.splits,
        groups=index.groups,
        group_names=tuple(name.rpartition("\0")[2] for name in index.group_names),
        scores=index.scores.astype(np.float32),
        classes=index.classes,
        preprocessing=preprocessing,
        batches=index.batches,
        batch_names=index.batch_names,
        doses=np.nan_to_num(index.doses).astype(np.float32),
    )

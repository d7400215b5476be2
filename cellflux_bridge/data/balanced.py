"""Random patches of which every class is as frequent as any other."""

import numpy as np
import torch

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import stain


class BalancedPatches:
    """Draws classes evenly, then patches of them with replacement, in training's crops, symmetries and stain jitter.

    `indices` are the numbers of the training patches. Raises UserError for a class that has none.
    """

    def __init__(self, patches: Patches, indices: np.ndarray, *, data: DataConfig):
        self._patches, self._data = patches, data
        self._members = [indices[patches.labels[indices] == number] for number in range(len(patches.classes))]
        for label, members in zip(patches.classes, self._members, strict=True):
            if len(members) == 0:
                raise UserError(f"class {label!r} has no patch in the train split; see `cellflux-bridge data check`")

    def draw(
        self, num: int, *, generator: torch.Generator, jitter: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Patches (num, 3, S, S) float32 in [-1, 1], their classes (num,) int64 and their numbers in the data set.

        Stain is jittered where data.stain.mode says so, by draws of `jitter` alone.
        """
        y = torch.randint(len(self._members), (num,), generator=generator)
        places = torch.rand(num, generator=generator).tolist()
        chosen = [
            int(self._members[c][int(u * len(self._members[c]))]) for c, u in zip(y.tolist(), places, strict=True)
        ]
        x = images.encode(self._patches.random(chosen, flips=self._data.flips, generator=generator))
        if self._data.stain.mode == "augment":
            x = stain.augment(x, strength=self._data.stain.strength, generator=jitter)
        return x, y, chosen

"""What every coupling has."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import one_hot


class Coupling(ABC):
    """Chooses which target goes with which source of a batch, as indices, so that labels and ids can follow."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the coupling looks at of images (n, C, H, W) in [-1, 1], each by itself: (n, ...), by default all of it.
        It is called with a few images at a time, so that a pool of large ones need not be in memory."""
        return images

    @abstractmethod
    def permutation(self, x0: torch.Tensor, x1: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """For each of the n sources of one block the number of its target: a permutation of 0..n-1, int64. x0 and x1
        (n, ...) are `features`."""

    def costs(self, x0: torch.Tensor, x1: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The cost (n, n) of each (source, target), where the permutation `chosen` has pairs that are not allowed: the
        least sum replaces it. By default 1 for each pair that `chosen` does not have, so that few pairs change."""
        return 1 - one_hot(chosen, len(chosen))

    def pair(
        self,
        x0: torch.Tensor,
        x1: torch.Tensor,
        *,
        blocks: torch.Tensor,
        generator: torch.Generator,
        patches: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (i, j) of the pairs (x0[i], x1[j]) of a batch; both are permutations of 0..B-1, and i is sorted.

        x0, x1: `features` (B, ...) of images. `blocks` (B,) int numbers the (group, source class, target class) of each
        row; pairs never leave their block, because pairing across classes skews the source once a condition is used
        (torchcfm issue 117; C2OT, ICCV 2025). `patches` are the numbers (B,) int64 of the patches that the sources and
        the targets are cut from: a pair has one patch on both sides only where every permutation of its block has as
        many such pairs (in a block of one row, for instance).
        """
        j = torch.empty(len(x0), dtype=torch.long)
        for block in blocks.unique():
            members = torch.nonzero(blocks == block).squeeze(1)
            chosen = self.permutation(x0[members], x1[members], generator=generator)
            if patches is not None:
                source, target = (numbers[members] for numbers in patches)
                if (source == target[chosen]).any():
                    costs = self.costs(x0[members], x1[members], chosen).double().cpu().numpy()
                    same = (source[:, None] == target).numpy()
                    costs[same] += len(members) * np.ptp(costs) + 1  # more than a whole permutation
                    chosen = torch.from_numpy(linear_sum_assignment(costs)[1])
            j[members] = members[chosen]
        return torch.arange(len(x0)), j

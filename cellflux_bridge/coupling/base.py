"""What every coupling has."""

from abc import ABC, abstractmethod

import torch


class Coupling(ABC):
    """Chooses which target goes with which source of a batch, as indices, so that labels and ids can follow."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What is to be seen of each image (n, C, H, W) in [-1, 1], by itself: (n, ...), by default all of it. It is
        asked of a few images at a time, so that a pool of large ones need not be in memory."""
        return images

    @abstractmethod
    def permutation(self, x0: torch.Tensor, x1: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """For each of the n sources of one block the number of its target: a permutation of 0..n-1, int64. x0 and x1
        (n, ...) are `features`."""

    def pair(
        self, x0: torch.Tensor, x1: torch.Tensor, *, blocks: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (i, j) of the pairs (x0[i], x1[j]) of a batch; both are permutations of 0..B-1, and i is sorted.

        x0, x1: `features` (B, ...) of images. `blocks` (B,) int numbers the (group, source class, target class) of each
        row; pairs never leave their block, because pairing across classes skews the source once a condition is used
        (torchcfm issue 117; C2OT, ICCV 2025).
        """
        j = torch.empty(len(x0), dtype=torch.long)
        for block in blocks.unique():
            members = torch.nonzero(blocks == block).squeeze(1)
            j[members] = members[self.permutation(x0[members], x1[members], generator=generator)]
        return torch.arange(len(x0)), j

"""A box of another image, pasted at its own place."""

import torch

from cellflux_bridge.augmentation.base import Alpha, Augmentation, boxes, draw_shares, paste
from cellflux_bridge.config.schema import Fraction


class CutMix(Augmentation):
    """A box of the partner at the same place in every image; labels by area (Yun et al. 2019, arXiv 1905.04899).

    The box has the sides sqrt(1 - share) * (H, W), rounded down, with a share from Beta(alpha, alpha), and its centre
    is any pixel. What reaches over the border is cut off, and labels follow the area that is left. `alpha` is 1 in
    the paper. `probability` is that of an image being mixed: 0.5 as published for CIFAR; the authors' ImageNet runs
    have 1. The paper draws one box and one coin for a batch, here every image has its own.
    """

    def __init__(self, *, alpha: Alpha = 1.0, probability: Fraction = 0.5):
        self._alpha, self._probability = alpha, probability

    def _centres(self, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Rows and columns (B, 2) int64 of the boxes' centres, of the partners `other` (B, C, H, W)."""
        return torch.stack([torch.randint(side, (len(other),), generator=generator) for side in other.shape[2:]], dim=1)

    def __call__(self, x, y, *, generator):
        partner = torch.randperm(len(x), generator=generator)
        other, sides = x[partner], torch.tensor(x.shape[2:])
        share = draw_shares(len(x), alpha=self._alpha, generator=generator)
        is_mixed = torch.rand(len(x), generator=generator) < self._probability
        sizes = ((1 - share).sqrt()[:, None] * sides).long() * is_mixed[:, None]
        mask = boxes(self._centres(other, generator) - sizes // 2, sizes, x.shape[2:])
        return paste(x, y, other, partner, mask)

"""What augmentations of labelled images share: their interface, the draws and the label rule of those that mix two."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

# Of a symmetric Beta distribution. Below 0.01 its draws are 0 or 1.
Alpha = Annotated[float, Field(ge=0.01, le=1000)]


class Augmentation(ABC):
    """A random change of labelled images in a classifier's training.

    Every image has draws of its own, and images that are mixed have partners by a random permutation of the batch (an
    image may be its own partner). All draws come from `generator`, which lies on the CPU: equal generators give equal
    results, and global random states are neither read nor changed. Inputs stay as they are.
    """

    @abstractmethod
    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, *, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1] and soft labels (B, K) float32 whose rows sum to 1, in the same form.

        Sides and number of channels may be any, and so may the device.
        """


def draw_shares(num: int, *, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """Shares (num,) float32 in [0, 1] from Beta(alpha, alpha). Torch's own Beta distribution takes no generator."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, num).astype(np.float32))


def boxes(corners: torch.Tensor, sizes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Masks (B, 1, H, W) bool of boxes with these upper left corners and sizes, both (B, 2) int64 (rows, columns).

    `shape` is (H, W). What lies outside of the image is left out.
    """
    ends, at = corners + sizes, [torch.arange(side) for side in shape]
    rows, columns = ((at[i] >= corners[:, i, None]) & (at[i] < ends[:, i, None]) for i in (0, 1))
    return (rows[:, :, None] & columns[:, None])[:, None]


def paste(
    x: torch.Tensor, y: torch.Tensor, other: torch.Tensor, partner: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images x with the pixels of `other` (B, C, H, W) where mask (B, 1, H, W) is true, and the mixed labels.

    `partner` (B,) is the number of the image whose label `other` has. Its weight is the true share of the mask, not
    the share that was drawn: both differ by rounding and where a box is cut off at the border.
    """
    share = mask.float().mean((1, 2, 3)).to(y.device)
    return torch.where(mask.to(x.device), other, x), torch.lerp(y, y[partner], share[:, None])

"""Optimal transport inside the blocks of a batch."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from cellflux_bridge.coupling.base import Coupling


class MinibatchOT(Coupling):
    """The assignment of least summed squared distance inside each block (Tong et al. 2024, OT-CFM).

    `cost` is what distances are measured on: `pixels`; `thumbnail` (the image averaged to `thumbnail` x `thumbnail`
    cells, much faster); or `structure`, the grey thumbnail with each image's own mean and contrast taken out, so that
    tint and darkness cannot decide who is paired with whom. Unlike torchcfm's sampler it draws nothing: every image
    of the batch is used exactly once, and equal seeds give equal pairs.
    """

    def __init__(
        self,
        *,
        cost: Literal["structure", "thumbnail", "pixels"] = "structure",
        thumbnail: Annotated[int, Field(ge=2, le=1024)] = 8,
    ):
        self._cost, self._thumbnail = cost, thumbnail

    def features(self, images):
        if self._cost == "pixels":
            return images.flatten(1)
        if self._cost == "structure":
            images = images.mean(dim=1, keepdim=True)
        cells = F.adaptive_avg_pool2d(images, min(self._thumbnail, images.shape[-1])).flatten(1)
        if self._cost == "structure":
            cells = (cells - cells.mean(dim=1, keepdim=True)) / cells.std(dim=1, keepdim=True).clamp_min(1e-4)
        return cells

    def costs(self, x0, x1, chosen=None):
        return torch.cdist(x0, x1).square()

    def permutation(self, x0, x1, *, generator):
        return torch.from_numpy(linear_sum_assignment(self.costs(x0, x1).cpu().numpy())[1])

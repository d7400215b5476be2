"""A square of each image blanked out."""

from typing import Annotated

import torch
from pydantic import Field

from cellflux_bridge.augmentation.base import Augmentation, boxes


class Cutout(Augmentation):
    """A square of zeros at a random place of every image; labels stay (DeVries & Taylor 2017, arXiv 1708.04552).

    `length` is the square's side as a share of the image's shorter side: 16 of 32 px on CIFAR-10 as published (8 px
    on CIFAR-100, 20 px on SVHN). Its centre is any pixel, so a square may reach over the border, and less than
    length^2 of the image is then blank. The paper's zero is the mean of normalised images; here it is the middle of
    [-1, 1], a grey.
    """

    def __init__(self, *, length: Annotated[float, Field(gt=0, le=1)] = 0.5):
        self._length = length

    def __call__(self, x, y, *, generator):
        shape = x.shape[2:]
        centres = torch.stack([torch.randint(side, (len(x),), generator=generator) for side in shape], dim=1)
        side = max(1, round(self._length * min(shape)))
        mask = boxes(centres - side // 2, torch.full_like(centres, side), shape)
        return x.masked_fill(mask.to(x.device), 0.0), y

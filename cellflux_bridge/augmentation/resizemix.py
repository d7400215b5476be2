"""Another image, whole but smaller, pasted at a random place."""

from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from cellflux_bridge.augmentation.base import Augmentation, boxes, paste
from cellflux_bridge.base.errors import UserError

_Scale = Annotated[float, Field(gt=0, le=1)]


class ResizeMix(Augmentation):
    """The whole partner, resized and pasted inside every image; labels by area (Qin et al. 2020, arXiv 2012.11101).

    Its sides are those of the image times a scale that is uniform in `smallest`..`largest`, rounded down; 0.1..0.8 is
    published. It is resized bilinearly, with antialiasing, so nuclei are averaged and not skipped. It lies anywhere
    inside the image, each place alike.
    """

    def __init__(self, *, smallest: _Scale = 0.1, largest: _Scale = 0.8):
        if smallest > largest:
            raise UserError(f"augmentation.smallest: {smallest} is above augmentation.largest={largest}; exchange them")
        self._smallest, self._largest = smallest, largest

    def __call__(self, x, y, *, generator):
        partner, sides = torch.randperm(len(x), generator=generator), torch.tensor(x.shape[2:])
        scales = torch.rand(len(x), 1, generator=generator) * (self._largest - self._smallest) + self._smallest
        sizes = (scales * sides).long().clamp(min=1)
        corners = (torch.rand(len(x), 2, generator=generator) * (sides - sizes + 1)).long()
        other = torch.zeros_like(x)
        for image, source, (top, left), size in zip(
            other, partner.tolist(), corners.tolist(), sizes.tolist(), strict=True
        ):
            small = F.interpolate(x[source, None], size=size, mode="bilinear", antialias=True)[0]
            image[:, top : top + size[0], left : left + size[1]] = small
        return paste(x, y, other, partner, boxes(corners, sizes, x.shape[2:]))

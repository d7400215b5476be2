"""Stain a little stronger or weaker."""

from typing import Annotated

from pydantic import Field

from cellflux_bridge.augmentation.base import Augmentation
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import stain


class StainJitter(Augmentation):
    """Haematoxylin and eosin of every image scaled and shifted in optical density; labels stay. RGB only.

    After Tellez et al. 2018 (arXiv 1808.05896), by `images.stain.augment`: scales are uniform in 1 +- strength, as
    published with `strength` 0.05 (Tellez et al. 2019, arXiv 1902.06543, call 0.05 light and 0.2 strong). Shifts are
    uniform in +- strength / 4 of natural-log density; the paper's are +- strength in the units of its own
    deconvolution.
    """

    def __init__(self, *, strength: Annotated[float, Field(gt=0, le=1)] = 0.05):
        self._strength = strength

    def __call__(self, x, y, *, generator):
        if x.shape[1] != 3:
            raise UserError(f"augmentation.name: stain_jitter is for RGB images, found {x.shape[1]} channels")
        return stain.augment(x, strength=self._strength, generator=generator), y

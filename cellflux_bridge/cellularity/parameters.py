"""How nuclei are sought."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

from cellflux_bridge.base.errors import UserError

STAINS = ("red", "ruifrok", "macenko")
# The bounds hold for parameters that are read from a file.
_Number = Annotated[float, Field(ge=0, le=10)]


@dataclass(frozen=True)
class Parameters:
    """How nuclei are sought; lengths are shares of the typical nuclear radius, which each image tells itself.

    stains            "red": absorption of the red channel; "ruifrok", "macenko": of haematoxylin, unmixed by fixed or
                      by the image's own stain vectors (fixed ones where those are unfit: see `haematoxylin`)
    smoothing         px, of absorption before it is thresholded
    threshold         share of the way from the background's mean to Otsu's threshold from which a pixel is nuclear
    landscape_smoothing, density_smoothing, density_reach, density_weight, split_depth, neck_power: see `splitting`
    outline           a nucleus ends where absorption has fallen to this share of its own mean, over the background
    least_area        of a nucleus, as a share of a disc of the typical radius
    least_contrast    of a nucleus's mean with the background, as a share of that of all nuclear pixels
    instanseg         a TorchScript file of InstanSeg, which then finds the nuclei instead (see `instanseg`); or ""
    first_scale, scale, scale_quantile   radius from the mean distance to the background (exactly 1 for discs); from
                      the area of which this share of the nuclear pixels lies in smaller nuclei (1 for discs)
    """

    stains: str = "red"
    instanseg: str = ""
    smoothing: _Number = 0.58
    threshold: _Number = 0.9
    landscape_smoothing: _Number = 0.12
    density_smoothing: _Number = 0.34
    density_reach: _Number = 0.9
    density_weight: _Number = 0.86
    split_depth: _Number = 0.07
    neck_power: _Number = 1.9
    outline: _Number = 0.62
    least_area: _Number = 0.03
    least_contrast: _Number = 0.35
    first_scale: _Number = 0.73
    scale: _Number = 1.0
    scale_quantile: _Number = 0.64

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self):
        if self.stains not in STAINS:
            raise UserError(f"stains {self.stains!r}: expected {', '.join(STAINS)}")

"""How nuclei are sought."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field

from cellflux_bridge.base.errors import UserError

METHODS = ("network", "classical", "instanseg")
STAINS = ("red", "ruifrok", "macenko")
# The bounds hold for parameters that are read from a file.
_Number = Annotated[float, Field(ge=0, le=10)]


class Scale(NamedTuple):
    """The scale at which the network sees images.

    factor     px of the network for one of the image
    diameter   of nuclei, px of the image, by which it was chosen; None with known microns per pixel or no nuclei
    agreement  in [0, 1], of the diameters that were found at several scales; 1 where microns per pixel were known
    """

    factor: Annotated[float, Field(ge=1 / 8, le=8, allow_inf_nan=False)]
    diameter: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    agreement: Annotated[float, Field(ge=0, le=1)] = 1.0


@dataclass(frozen=True)
class Parameters:
    """How nuclei are sought.

    method            "network" (see `finding`), "classical": rules of colour (see `classical`), "instanseg"
    model             the network's file or run folder; "": the built-in one
    device            where the network runs: "cpu", "cuda", "cuda:1"
    instanseg         a TorchScript file of InstanSeg (see `instanseg`), which the method of that name needs

    The rest belongs to "classical". Lengths are shares of the typical nuclear radius, which each image tells itself.

    stains            "red": absorption of the red channel; "ruifrok", "macenko": of haematoxylin, unmixed by fixed or
                      by the image's own stain vectors (fixed ones where those are unfit: see `haematoxylin`)
    smoothing         px, of absorption before it is thresholded
    threshold         share of the way from the background's mean to Otsu's threshold from which a pixel is nuclear
    landscape_smoothing, density_smoothing, density_reach, density_weight, split_depth, neck_power: see `splitting`
    outline           a nucleus ends where absorption has fallen to this share of its own mean, over the background
    least_area        of a nucleus, as a share of a disc of the typical radius
    least_contrast    of a nucleus's mean with the background, as a share of that of all nuclear pixels
    first_scale, scale, scale_quantile   radius from the mean distance to the background (exactly 1 for discs); from
                      the area of which this share of the nuclear pixels lies in smaller nuclei (1 for discs)
    """

    method: str = "network"
    model: str = ""
    device: str = "cpu"
    instanseg: str = ""
    stains: str = "red"
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

    @property
    def file(self) -> str:
        """The file of the user's own from which a network is loaded; "" for the built-in one and for rules."""
        return self.instanseg or self.model

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r}: expected {', '.join(METHODS)}")
        if (self.method == "instanseg") != bool(self.instanseg):
            raise UserError("the method instanseg and the file of its network, --instanseg FILE, go together")
        if self.stains not in STAINS:
            raise UserError(f"stains {self.stains!r}: expected {', '.join(STAINS)}")

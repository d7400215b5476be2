"""The built-in nuclei network as an extractor: features of stained tissue that need no training and no download."""

import copy

import torch
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.maps import maps_of, scale_factor
from cellflux_bridge.cellularity.network import load_network
from cellflux_bridge.data.patches import Patches

NAME = "nuclei"


class NucleiExtractor(nn.Module):
    """Mean and standard deviation over space of every map of the nuclei network, at the scale of training patches.

    UserError where patches are not RGB, or where it finds no nuclei in them.
    """

    def __init__(self, patches: Patches):
        super().__init__()
        if patches.preprocessing.channels != 3:
            raise UserError(
                f"--features {NAME}: the network sees stained tissue in RGB, the patches have "
                f"{patches.preprocessing.channels} channels; name a classifier's run, or timm:NAME"
            )
        self.net = copy.deepcopy(load_network())
        factor = scale_factor(patches, self.net, seed=0)
        if factor is None:
            raise UserError(
                f"--features {NAME}: the network finds no nuclei in the training patches; it knows H&E alone, with "
                "nuclei of a few pixels. Name a classifier's run, or timm:NAME"
            )
        self._factor = round(factor, 2)  # as the view, and by it the digest of the outputs, says
        self.view = f"{type(self.net).__name__}, patches enlarged {self._factor:.2f} times"

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of patches (B, 3, H, W) in [-1, 1]."""
        maps = self.feature_maps(x)
        return torch.cat([of for seen in maps for of in (seen.mean((2, 3)), seen.std((2, 3), correction=0))], dim=1)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Its maps (B, C, h, w): from fine to coarse, and back."""
        return maps_of(self.net, x, factor=self._factor)


def extractor_for(patches: Patches) -> NucleiExtractor | None:
    """The extractor, or None where it cannot look at the patches: they are not RGB, or it finds no nuclei."""
    try:
        return NucleiExtractor(patches)
    except UserError:
        return None

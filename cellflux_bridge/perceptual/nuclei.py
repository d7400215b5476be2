"""A perceptual loss of nuclei: what the nuclei network sees in a predicted image, beside what it sees in the real one.

A network that learns by squared errors draws the mean of all nuclei that may stand at a place: one large, pale blob for
several that touch. What a network sees that tells nuclei apart differs most where an outline is missing. So the
distance of its maps (Johnson et al. 2016, arXiv 1603.08155, eq. 2, with this network in the place of one of
photographs) asks for outlines.
"""

import copy
from collections.abc import Callable

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.maps import maps_of, scale_factor
from cellflux_bridge.cellularity.network import load_network
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches

# Of what it sees: maps at a half, a quarter and an eighth of the resolution, and the last.
_MAPS = (0, 1, 2, -1)
# Patches are enlarged by at most so much, for speed.
_MOST_ENLARGED = 2.0


class NucleiLoss:
    """The loss for patches of a configuration, by its section `perceptual`. UserError where they are not RGB, or where
    no nuclei are found in them.

    Patches are brought towards the network's scale, as far as their nuclei tell it. `decode` makes images (B, 3, H, W),
    about [-1, 1], of what is predicted.
    """

    def __init__(self, config: Config, patches: Patches, decode: Callable[[torch.Tensor], torch.Tensor] = torch.clone):
        share = config.perceptual.share
        if config.data.channels != 3:
            raise UserError(
                f"perceptual.share={share:g}: the network sees stained tissue in RGB, but data.channels="
                f"{config.data.channels}; set perceptual.share=0"
            )
        factor = scale_factor(patches, load_network(), seed=config.seed)
        if factor is None:
            raise UserError(
                f"perceptual.share={share:g}: the network finds no nuclei in the training patches of "
                f"{config.data.root}; it knows H&E alone, with nuclei of a few pixels. Set perceptual.share=0"
            )
        self._share, self._factor = share, min(_MOST_ENLARGED, factor)
        self._network, self._decode = copy.deepcopy(load_network()), decode

    def __call__(self, made: torch.Tensor, real: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """A loss (scalar, of value 0) of predictions `made` beside `real` ones, (B, C, H, W) before they are decoded.

        Its gradient at `made` is that of their distance, and `share` times as long as `gradient`, that of the squared
        error there.
        """
        seen = made.detach().requires_grad_()
        with torch.enable_grad():
            towards = torch.autograd.grad(self.distance(seen, real), seen)[0]
        size = self._share * gradient.norm() / towards.norm().clamp_min(1e-12)
        return size * (towards * (made - made.detach())).sum()

    def distance(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The squared distance of maps, relative to the power of those of `real`, summed over the maps."""
        with torch.no_grad():
            wanted = self._maps(real)
        pairs = zip(self._maps(made), wanted, strict=True)
        return sum((a - b).square().mean() / b.square().mean().clamp_min(1e-12) for a, b in pairs)

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        seen = maps_of(self._network.to(x.device), self._decode(x).float(), factor=self._factor)
        return [seen[number] for number in _MAPS]

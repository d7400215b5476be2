"""The path with noise in its middle and smooth ends (CellFluxV2)."""

import math

import torch

from cellflux_bridge.path.base import Path, Scale


class Smooth(Path):
    """x_t = (1 - t) x0 + t x1 + scale sin^2(pi t) eps, u = x1 - x0 + scale pi sin(2 pi t) eps (CellFluxV2 form).

    Noise and its derivative vanish at both ends; translation starts at the clean source.
    """

    def __init__(self, *, scale: Scale = 0.5):
        self._scale = scale

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return self._scale * torch.sin(math.pi * t) ** 2

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return self._scale * math.pi * torch.sin(2 * math.pi * t)

    def without_noise(self, x_t, t, noise):
        """The state itself: it starts clean, so its noise is not the one that was drawn for the start."""
        return x_t

"""The straight path from Gaussian noise, for noise -> data flows and pre-training."""

import torch

from cellflux_bridge.path.base import Path


class GaussianSource(Path):
    """x_t = (1 - t) eps + t x1, u = x1 - eps (rectified flow; Liu et al. 2023): the source image is not used."""

    from_data = False
    straight = True

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)

    def start(self, x0, noise):
        return noise

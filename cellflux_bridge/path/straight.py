"""The straight, noise-free path."""

import torch

from cellflux_bridge.path.base import Path


class Straight(Path):
    """x_t = (1 - t) x0 + t x1, u = x1 - x0 (Lipman et al. 2023; Tong et al. 2024, I-CFM with sigma = 0).

    Deterministic pairs are memorised more easily than noisy ones (arXiv 2510.18118); prefer `noised_source` unless
    the reverse ODE is wanted.
    """

    reversible = True
    straight = True

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t)

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t)

"""The path with noise in its middle and smooth ends (CellFluxV2)."""

import math

import torch
from torchcfm import ConditionalFlowMatcher
from torchcfm.conditional_flow_matching import pad_t_like_x

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.path.base import Path, PathSample


class _SmoothMatcher(ConditionalFlowMatcher):
    def compute_sigma_t(self, t):
        return self.sigma * torch.sin(math.pi * t) ** 2

    def compute_conditional_flow(self, x0, x1, t, eps):
        return x1 - x0 + self.sigma * math.pi * torch.sin(2 * math.pi * pad_t_like_x(t, x0)) * eps


class Smooth(Path):
    """x_t = (1 - t) x0 + t x1 + scale sin^2(pi t) eps, u = x1 - x0 + scale pi sin(2 pi t) eps (CellFluxV2 form).

    Noise and its derivative vanish at both ends; translation starts at the clean source.
    """

    def __init__(self, *, scale: float = 0.5):
        if scale <= 0:
            raise UserError(f"path.scale: {scale} is no noise; expected a number above 0, or path.name=straight")
        self._matcher = _SmoothMatcher(sigma=scale)

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return self._matcher.compute_sigma_t(t)

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return self._matcher.sigma * math.pi * torch.sin(2 * math.pi * t)

    def without_noise(self, x_t, t, noise):
        """The state itself: it starts clean, so its noise is not the one that was drawn for the start."""
        return x_t

    def sample(self, x0, x1, t, *, generator) -> PathSample:
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t = self._matcher.sample_xt(x0, x1, t, eps)
        return PathSample(x_t, self._matcher.compute_conditional_flow(x0, x1, t, eps))

"""The straight path from Gaussian noise, for noise -> data flows and pre-training."""

import torch
from torchcfm import ConditionalFlowMatcher

from cellflux_bridge.path.base import Path, PathSample


class GaussianSource(Path):
    """x_t = (1 - t) eps + t x1, u = x1 - eps (rectified flow; Liu et al. 2023): the source image is not used."""

    from_data = False
    straight = True

    def __init__(self):
        self._matcher = ConditionalFlowMatcher(sigma=0.0)

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)

    def start(self, x0, noise):
        return noise

    def sample(self, x0, x1, t, *, generator) -> PathSample:
        eps = torch.randn(x1.shape, generator=generator).to(x1)
        x_t = self._matcher.compute_mu_t(eps, x1, t)
        return PathSample(x_t, self._matcher.compute_conditional_flow(eps, x1, t, x_t))

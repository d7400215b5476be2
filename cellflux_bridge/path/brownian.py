"""The Brownian bridge between source and target."""

import torch
from torchcfm import SchrodingerBridgeConditionalFlowMatcher

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.path.base import Path, PathSample


class Brownian(Path):
    """x_t = (1 - t) x0 + t x1 + scale sqrt(t (1 - t)) eps (Tong et al. 2024, SB-CFM, eq. 20 and 21).

    Its u_t grows without bound toward both ends, so times keep `margin` away from them and translation starts at
    t = margin from x0 + scale sqrt(margin (1 - margin)) eps. This leaves out margin * (x1 - x0), which nobody knows at
    the start, and biases the end: a class of mean 1 and source 0 ends at .85 with margin .03, .91 with .01 (scale .7).
    """

    noise_on_every_sample = True

    def __init__(self, *, scale: float = 0.5, margin: float = 0.02):
        if scale <= 0:
            raise UserError(f"path.scale: {scale} is no noise; expected a number above 0, or path.name=straight")
        if not 0 < margin < 0.5:
            raise UserError(f"path.margin: {margin}; expected a number between 0 and 0.5")
        # Pairs come coupled; the matcher's own sampler, which would pair again, is not called.
        self._matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=scale)
        self.t_start = self.margin = margin

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return self._matcher.compute_sigma_t(t)

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return self._matcher.sigma * (1 - 2 * t) / (2 * torch.sqrt(t * (1 - t)))

    def score_factor(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, self._matcher.sigma**2 / 2)  # what the general form comes to, without its 0 / 0

    def endpoint(self, x_t, velocity, t, x0):
        """The general form with its roots cancelled, so that it holds at t = 1, too, where gamma' is infinite."""
        t = t.view(-1, 1, 1, 1)
        return (2 * t * (1 - t) * (velocity + x0) - (1 - 2 * t) * (x_t - (1 - t) * x0)) / t

    def sample(self, x0, x1, t, *, generator) -> PathSample:
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t = self._matcher.sample_xt(x0, x1, t, eps)
        return PathSample(x_t, self._matcher.compute_conditional_flow(x0, x1, t, x_t))

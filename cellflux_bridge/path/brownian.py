"""The Brownian bridge between source and target."""

from typing import Annotated

import torch
from pydantic import Field

from cellflux_bridge.path.base import Path, Scale


class Brownian(Path):
    """x_t = (1 - t) x0 + t x1 + scale sqrt(t (1 - t)) eps (Tong et al. 2024, SB-CFM, eq. 20 and 21).

    Its u_t grows without bound toward both ends, so a network is trained and evaluated at times in
    [margin, 1 - margin] only. Translation starts at t = margin from x0 + scale sqrt(margin (1 - margin)) eps. This
    leaves out margin * (x1 - x0), which nobody knows at the start, and biases the end: a class of mean 1 and source 0
    ends at .85 with margin .03, at .91 with .01 (scale .7). Beyond 1 - margin the velocity is that of 1 - margin, which
    leaves noise of about scale sqrt(margin) / 2 in the image; a smaller margin leaves less.
    """

    noise_on_every_sample = True

    def __init__(self, *, scale: Scale = 0.5, margin: Annotated[float, Field(gt=0, lt=0.5)] = 0.02):
        self._scale, self.t_start, self.margin = scale, margin, margin

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return self._scale * torch.sqrt(t * (1 - t))

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return self._scale * (1 - 2 * t) / (2 * torch.sqrt(t * (1 - t)))

    def score_factor(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, self._scale**2 / 2)  # what the general form comes to, without its 0 / 0

    def endpoint(self, x_t, velocity, t, x0):
        """The general form with its roots cancelled, so that it holds at t = 1, too, where gamma' is infinite."""
        t = t.view(-1, 1, 1, 1)
        return (2 * t * (1 - t) * (velocity + x0) - (1 - 2 * t) * (x_t - (1 - t) * x0)) / t

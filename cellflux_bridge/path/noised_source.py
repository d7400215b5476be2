"""The straight path from a noised source (CellFlux)."""

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.path.base import MATCHER, Path, PathSample, Scale, Share


class NoisedSource(Path):
    """x0 <- x0 + scale * eps with `probability`, per sample; then the straight path from the noised x0.

    CellFlux (ICML 2025, arXiv 2502.09775) with one coin a sample instead of one a batch. `scale` is the dial between
    preservation of the source (small) and structural change (large). `colour` is the share of the noise's strength in
    differences of the channels: tissue differs less in colour than in brightness, and noise that a network leaves in an
    image shows most in its colour; 1 is white noise, as published. With probability below 1, `noisy_start` says
    whether translation starts from the noised image, too; with probability 1 it must.
    """

    straight = True

    def __init__(self, *, scale: Scale = 0.5, colour: Share = 1.0, probability: Share = 1.0, noisy_start: bool = True):
        if probability == 1 and not noisy_start:
            raise UserError("path.noisy_start: with probability 1 the network never saw a clean source; set it true")
        self._scale, self._probability, self._noisy_start = scale, probability, noisy_start
        self._colour, self.white = colour, colour == 1
        self.noise_on_every_sample = probability == 1

    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        return self._scale * (1 - t) * self._noisy_start

    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, -self._scale * self._noisy_start)

    def coloured(self, noise: torch.Tensor) -> torch.Tensor:
        if self.white:
            return noise
        mean = noise.mean(1, keepdim=True)
        return mean + self._colour * (noise - mean)

    def draw_noise(self, shape, *, generator) -> torch.Tensor:
        eps = super().draw_noise(shape, generator=generator)
        return (torch.rand(len(eps), generator=generator) < self._probability).float().view(-1, 1, 1, 1) * eps

    def sample(self, x0, x1, t, noise) -> PathSample:
        noised = x0 + self._scale * self.coloured(noise)
        x_t = MATCHER.compute_mu_t(noised, x1, t)
        return PathSample(x_t, MATCHER.compute_conditional_flow(noised, x1, t, x_t))

"""What every path from source to target has."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch


class PathSample(NamedTuple):
    """States x_t and regression targets u_t = d x_t / dt, both (B, C, H, W)."""

    x_t: torch.Tensor
    u_t: torch.Tensor


class Path(ABC):
    """x_t = (1 - t) x0 + t x1 + noise_scale(t) * eps, with t = 0 the source and t = 1 the target.

    A network is trained on `sample` at times drawn uniformly in [t_start, 1 - margin], and integrated from
    `start(x0, noise)` at t_start to 1.
    """

    t_start: float = 0.0
    margin: float = 0.0
    # The state at t = 0 is a source image, so that a given image can be carried along.
    from_data: bool = True
    # Gaussian noise lies on the state of every sample from the start, so the network may also see the clean x0.
    noise_on_every_sample: bool = False
    # Noise-free and straight: the reverse ODE from a target image ends at a source image.
    reversible: bool = False

    def times(self, num: int, *, generator: torch.Generator) -> torch.Tensor:
        """Training times (num,), stratified so that a batch covers the interval evenly; each is uniform."""
        uniform = (torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)) / num
        return self.t_start + (1 - self.margin - self.t_start) * uniform

    @abstractmethod
    def sample(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, *, generator: torch.Generator) -> PathSample:
        """A state and its target for each pair; x0, x1 (B, C, H, W) in [-1, 1], t (B,)."""

    @abstractmethod
    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        """Standard deviation gamma(t) of the noise on a state that started noisy; t of any shape."""

    def start(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The state to integrate from at t_start; `noise` is standard normal, shaped like x0."""
        return x0 + self.noise_scale(torch.tensor(self.t_start)).to(x0) * noise

    def without_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A state without the share of its start noise that the path still carries at t.

        Along a conditional path eps is constant, so what remains is the noise-free (1 - t) x0 + t x1: what a frame of
        the path should show. At t = 1 nothing is subtracted.
        """
        return x_t - self.noise_scale(t).to(x_t) * noise

"""What every path from source to target has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torchcfm import ConditionalFlowMatcher

Scale = Annotated[float, Field(gt=0, le=1000)]  # standard deviation of the noise; images lie in [-1, 1]
Share = Annotated[float, Field(gt=0, le=1)]

# Pairs come coupled: only the matcher's mean and flow are used, not its sampler.
MATCHER = ConditionalFlowMatcher(sigma=0.0)


class PathSample(NamedTuple):
    """States x_t and regression targets u_t = d x_t / dt, both (B, C, H, W)."""

    x_t: torch.Tensor
    u_t: torch.Tensor


class Path(ABC):
    """x_t = (1 - t) x0 + t x1 + noise_scale(t) eps, with t = 0 the source and t = 1 the target; u_t = d x_t / dt.

    A network is trained on `sample` at times drawn uniformly in [t_start, 1 - margin], and integrated from
    `start(x0, noise)` at t_start to 1, where it is evaluated at the nearest trained time (`trained`).
    """

    t_start: float = 0.0
    margin: float = 0.0
    # The state at t = 0 is a source image, so that a given image can be carried along.
    from_data: bool = True
    # Gaussian noise lies on the state of every sample from the start, so the network may also see the clean x0.
    noise_on_every_sample: bool = False
    # Noise-free and straight: the reverse ODE from a target image ends at a source image.
    reversible: bool = False
    # The noise on a state is the same in all directions, which the exact forms of guidance need.
    white: bool = True
    # x_t + (1 - t) u_t = x1, which holds where all noise shrinks with 1 - t.
    straight: bool = False

    def times(self, num: int, *, generator: torch.Generator) -> torch.Tensor:
        """Training times (num,), stratified so that a batch covers the interval evenly; each is uniform."""
        uniform = (torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)) / num
        return self.t_start + (1 - self.margin - self.t_start) * uniform

    def trained(self, t: torch.Tensor) -> torch.Tensor:
        """The times nearest to t, of any shape, for which networks were trained."""
        return t.clamp(self.t_start, 1 - self.margin)

    def draw_noise(self, shape: Sequence[int], *, generator: torch.Generator) -> torch.Tensor:
        """What `sample` lays on states of a shape (B, C, H, W): unit noise."""
        return torch.randn(shape, generator=generator)

    def sample(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> PathSample:
        """A state and its target for each pair; x0, x1 (B, C, H, W) in [-1, 1], t (B,), `noise` from `draw_noise`."""
        x0, s = x0 if self.from_data else torch.zeros_like(x0), t.view(-1, 1, 1, 1)
        mean = MATCHER.compute_mu_t(x0, x1, t)
        flow = MATCHER.compute_conditional_flow(x0, x1, t, mean)
        return PathSample(mean + self.noise_scale(s) * noise, flow + self.noise_rate(s) * noise)

    def coloured(self, noise: torch.Tensor) -> torch.Tensor:
        """White noise (B, C, H, W) as this path lays it on states."""
        return noise

    @abstractmethod
    def noise_scale(self, t: torch.Tensor) -> torch.Tensor:
        """Standard deviation gamma(t) of the noise on a state that started noisy; t of any shape."""

    @abstractmethod
    def noise_rate(self, t: torch.Tensor) -> torch.Tensor:
        """gamma'(t), the derivative of `noise_scale`."""

    def score_factor(self, t: torch.Tensor) -> torch.Tensor:
        """b(t) = gamma (gamma / t - gamma') in v(x | y) = v(x) + b(t) grad_x log p(y | x, t); t of any shape, above 0.

        Exact where noise gamma(t) lies on every sample and network and classifier see all else of x_t but x1: nothing
        for a Gaussian source, the clean x0 for the others. From E[eps | x] = -gamma grad log p and the two linear
        equations of x_t and u_t (method of Dhariwal & Nichol 2021, sec. 4, for flows).
        """
        gamma = self.noise_scale(t)
        return gamma * (gamma / t - self.noise_rate(t))

    def has_endpoint(self) -> bool:
        """Whether `endpoint` can be computed at every t above 0."""
        t = torch.linspace(0.01, 0.99, 99)
        return self.straight or bool((self.noise_scale(t) - t * self.noise_rate(t) > 0).all())

    def endpoint(
        self, x_t: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor, x0: torch.Tensor | None
    ) -> torch.Tensor:
        """E[x1 | x_t] (B, C, H, W) that a velocity at x_t stands for; t (B,), x0 the clean source.

        x_t + (1 - t) v on straight paths; else the solution for x1 of x_t = (1 - t) x0 + t x1 + gamma eps and
        v = x1 - x0 + gamma' eps, which needs x0.
        """
        t = t.view(-1, 1, 1, 1)
        if self.straight:
            return x_t + (1 - t) * velocity
        gamma, rate = self.noise_scale(t), self.noise_rate(t)
        return (gamma * (velocity + x0) - rate * (x_t - (1 - t) * x0)) / (gamma - t * rate)

    def start(self, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The state to integrate from at t_start; `noise` is standard normal, shaped like x0."""
        return x0 + self.noise_scale(torch.tensor(self.t_start)).to(x0) * self.coloured(noise)

    def without_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A state without the start noise that is left at t: along a conditional path (1 - t) x0 + t x1 remains, which
        a frame should show. At t = 1 nothing is subtracted."""
        return x_t - self.noise_scale(t).to(x_t) * self.coloured(noise)

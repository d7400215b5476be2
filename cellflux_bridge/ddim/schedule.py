"""The noise schedule of DDIM stairs: 1000 linear steps (Ho et al. 2020), respaced to fewer levels."""

from typing import NamedTuple

import torch

from cellflux_bridge.base.errors import UserError

NUM_STEPS = 1000


def linear_betas() -> torch.Tensor:
    """beta of the 1000 steps, float64."""
    return torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)


def alphas_bar() -> torch.Tensor:
    """abar^{1000}_tau = prod_{s <= tau} (1 - beta_s), float64 (1000,): how much of the image's power is left at tau."""
    return (1 - linear_betas()).cumprod(0)


class Schedule(NamedTuple):
    """T levels k = 0..T-1 out of the 1000 steps.

    `tau` (T,) int64 is the step that a network gets at k; `alpha_bar` (T + 2,) float64 starts at level -1: use `at`.
    """

    tau: torch.Tensor
    alpha_bar: torch.Tensor

    def __len__(self) -> int:
        return len(self.tau)

    def at(self, k: int) -> float:
        """abar_k for k = -1..T; abar_{-1} = 1 is the clean image and abar_T := 0 is pure noise."""
        assert -1 <= k <= len(self), k
        return float(self.alpha_bar[k + 1])


def respaced(timesteps: int) -> Schedule:
    """The levels tau_k = i k of T = `timesteps`, the "ddimT" respacing of guided-diffusion: i is the smallest stride
    that takes exactly T of the 1000 steps. Raises UserError where no stride does."""
    strides = {len(range(0, NUM_STEPS, stride)): stride for stride in range(NUM_STEPS - 1, 0, -1)}
    if timesteps not in strides:
        near = sorted(sorted(strides, key=lambda num: abs(num - timesteps))[:2])
        raise UserError(f"ddim.timesteps: no stride takes {timesteps} of {NUM_STEPS} steps; use {near[0]} or {near[1]}")
    tau, abar = torch.arange(0, NUM_STEPS, strides[timesteps]), alphas_bar()
    return Schedule(tau, torch.cat([abar.new_ones(1), abar[tau], abar.new_zeros(1)]))


def add_noise(x: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """A draw of q(x_tau | x) from unit noise, for steps tau (B,) of the full schedule (Ho et al. 2020, eq. 4)."""
    kept = alphas_bar().to(tau.device)[tau][:, None, None, None]
    return kept.sqrt().to(x.dtype) * x + (1 - kept).sqrt().to(x.dtype) * noise

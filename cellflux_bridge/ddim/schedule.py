"""The noise schedule of the reference bridge: 1000 linear steps (Ho et al. 2020), respaced to fewer levels."""

from typing import NamedTuple

import torch

from cellflux_bridge.base.errors import UserError

NUM_STEPS = 1000
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02


def linear_betas() -> torch.Tensor:
    """beta of the 1000 steps, float64."""
    return torch.linspace(_FIRST_BETA, _LAST_BETA, NUM_STEPS, dtype=torch.float64)


def alphas_bar() -> torch.Tensor:
    """abar^{1000}_tau = prod_{s <= tau} (1 - beta_s), float64 (1000,): how much of the image's power is left at tau."""
    return (1 - linear_betas()).cumprod(0)


class Schedule(NamedTuple):
    """T levels k = 0..T-1 out of the 1000 steps.

    `tau` (T,) int64 is what a network is told of level k; `alpha_bar` (T + 2,) float64 starts at level -1: use `at`.
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
    """The levels tau_k = 1000 k / T of T = `timesteps`, the "ddimT" respacing of guided-diffusion.

    Raises UserError where T does not divide 1000, because the levels would not be steps that networks were trained on.
    """
    if timesteps < 1 or NUM_STEPS % timesteps:
        raise UserError(f"ddim.timesteps: {timesteps} does not divide {NUM_STEPS}; use 100, 50 or 25")
    tau = torch.arange(timesteps) * (NUM_STEPS // timesteps)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return Schedule(tau, torch.cat([one, alphas_bar()[tau], zero]))


def add_noise(x: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """A draw of q(x_tau | x) from unit noise, for steps tau (B,) of the full schedule (Ho et al. 2020, eq. 4)."""
    kept = alphas_bar().to(tau.device)[tau][:, None, None, None]
    return kept.sqrt().to(x.dtype) * x + (1 - kept).sqrt().to(x.dtype) * noise

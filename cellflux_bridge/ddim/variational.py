"""The variational bound of one denoising step, which trains the variance of `learn_sigma` networks.

Improved denoising diffusion (Nichol & Dhariwal 2021): eq. 15 for the variance, L_vlb of eq. 4 to 7.
"""

import math

import torch
from torch import Tensor

from cellflux_bridge.ddim.schedule import NUM_STEPS, alphas_bar, linear_betas

# lambda of L_hybrid = L_simple + lambda L_vlb (eq. 16); L_vlb sums 1000 steps, one of which is drawn.
VLB_WEIGHT = 0.001 * NUM_STEPS
_HALF_BIN = 1 / 255  # of 8-bit values in [-1, 1]


def step_bound(x0: Tensor, x_t: Tensor, tau: Tensor, eps: Tensor, v: Tensor) -> Tensor:
    """L_{tau-1}, or the decoder's L_0 at tau = 0, in bits per pixel value, mean over the batch; a scalar.

    x0 and x_t (B, C, H, W) are the clean and the noised image, tau (B,) the step, eps and v network outputs of their
    shape. Only v is trained by it: eps enters without gradient, as in the paper.
    """
    beta, abar = linear_betas().to(x0.device), alphas_bar().to(x0.device)
    abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
    posterior = beta * (1 - abar_before) / (1 - abar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])  # 0 at tau = 0, where its logarithm is not needed

    def at(values: Tensor) -> Tensor:
        return values[tau].to(x0.dtype)[:, None, None, None]

    predicted = (x_t - at((1 - abar).sqrt()) * eps.detach()) / at(abar.sqrt())
    share = (v + 1) / 2
    log_variance = share * at(beta.log()) + (1 - share) * at(posterior.log())  # eq. 15
    # Both means hold x_t alike (DDPM, eq. 7), so that they differ by what they hold of the clean image.
    apart = at(beta * abar_before.sqrt() / (1 - abar)) * (x0 - predicted)
    divergence = _normal_kl(at(posterior.log()), log_variance, apart)
    likelihood = _discretised_log_likelihood(x0, predicted, 0.5 * log_variance)  # at tau = 0 the mean is predicted
    return torch.where(tau[:, None, None, None] == 0, -likelihood, divergence).mean() / math.log(2)


def _normal_kl(log_variance1: Tensor, log_variance2: Tensor, apart: Tensor) -> Tensor:
    """KL(N(m1, e^log_variance1) || N(m2, e^log_variance2)) for means m1 - m2 = `apart`, elementwise."""
    change = log_variance1 - log_variance2
    return 0.5 * (change.exp() - change - 1 + apart.square() * (-log_variance2).exp())


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 8-bit value x under a normal; the outermost bins are open (DDPM, eq. 13)."""
    upper = torch.special.ndtr((x - mean + _HALF_BIN) * (-log_std).exp())
    lower = torch.special.ndtr((x - mean - _HALF_BIN) * (-log_std).exp())
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()

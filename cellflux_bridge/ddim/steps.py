"""One DDIM step on each of the two ways, and the two forms of guidance.

Equations are those of DDIM (Song et al. 2020, arXiv 2010.02502) with eta = 0 and of ADM (Dhariwal & Nichol 2021, arXiv
2105.05233). With x = (z_k - sqrt(1 - abar_k) eps) / sqrt(abar_k), the predicted clean image (DDIM eq. 9), one step of
either way is z_j = sqrt(abar_j) x + sqrt(1 - abar_j) eps: Euler's rule for d(z / sqrt(abar)) = eps dsigma with sigma =
sqrt((1 - abar) / abar) (DDIM eq. 13 and 14). Where Cellflow's release departs from them, "Departs" says so.
"""

from collections.abc import Callable

import torch

from cellflux_bridge.ddim.schedule import Schedule

Eps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Classifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NoisePredictor:
    """The noise (B, C, H, W) in states x (B, C, H, W) at steps tau (B,) int64 of 1000, given classes y (B,).

    With a `null_class` it is guided without a classifier: (1 + w) eps(x, y) - w eps(x, null) (Ho & Salimans 2022, arXiv
    2207.12598, eq. 6). Cellflow's variant takes w = 1.8 on both ways (w' = 1 + w in null + w' (class - null)). Departs:
    the release calls the network a third time and discards the result. `forwards` counts those of one call.
    """

    def __init__(self, eps: Eps, *, null_class: int | None = None, weight: float = 0.0):
        self._eps, self._null_class, self._weight = eps, null_class, weight
        self.forwards = 1 if null_class is None else 2

    def __call__(self, x: torch.Tensor, tau: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self._null_class is None:
            return self._eps(x, tau, y)
        null = self._eps(x, tau, torch.full_like(y, self._null_class))
        return (1 + self._weight) * self._eps(x, tau, y) - self._weight * null


def classifier_gradient(classifier: Classifier, x: torch.Tensor, tau: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """grad_x log p(y | x, tau) of every image, (B, C, H, W): the gradient of ADM's Algorithms 1 and 2."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        chosen = classifier(x, tau).log_softmax(1).gather(1, y[:, None])
        return torch.autograd.grad(chosen.sum(), x)[0]


def guided_eps(eps: torch.Tensor, gradient: torch.Tensor, k: int, schedule: Schedule, *, scale: float) -> torch.Tensor:
    """eps - sqrt(1 - abar_k) s grad log p(y | z_k): ADM Algorithm 2, whose s = 1 is eq. 14 of its sec. 4.2."""
    return eps - (1 - schedule.at(k)) ** 0.5 * scale * gradient


def encode_step(z: torch.Tensor, eps: torch.Tensor, k: int, schedule: Schedule) -> torch.Tensor:
    """z_{k+1} from z_k and its eps: DDIM's ODE (eq. 13 and 14) run towards noise, as in its sec. 5.4, unguided.

    Departs: the clean image is taken for z_0, though abar_0 < 1; and abar_T := 0, so that z_T is eps itself.
    """
    return _moved(z, eps, schedule.at(k), schedule.at(k + 1))


def decode_step(u: torch.Tensor, eps: torch.Tensor, k: int, schedule: Schedule) -> torch.Tensor:
    """The state at abar_{k-1} from u at abar_k and its (guided) eps: DDIM eq. 12 with sigma = 0, without clipping.

    Departs: a decode from depth d starts with k = d - 1 although z_d lies at abar_d (off by one; it stays, being the
    reference), and its last step, k = 0, ends at abar_{-1} = 1.
    """
    return _moved(u, eps, schedule.at(k), schedule.at(k - 1))


def _moved(z: torch.Tensor, eps: torch.Tensor, abar: float, abar_next: float) -> torch.Tensor:
    x = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
    return abar_next**0.5 * x + (1 - abar_next) ** 0.5 * eps

"""Classifier-gradient guidance as wrappers around any velocity, classifier-free guidance included.

All three forms steer toward a soft label q: they follow the gradient of sum_y q_y log p(y | .), which is that of
log p(y | .) where q is one class.

score     v + weight b(t) grad_x sum_y q_y log p(y | x_t, t),  b(t) = (1 - t) / t
          Exact, at weight 1 and for one class, for a Gaussian source (Dhariwal & Nichol 2021, sec. 4, carried from
          scores to velocities), with a classifier trained on x_t.
bridge    the same with p(y | x_t, x0, t) and b(t) = gamma (gamma / t - gamma'), gamma(t) the path's noise
          Exact, likewise, for a data source where noise lies on every sample and network and classifier see the clean
          x0: s^2 (1 - t) / t for a noised source, s^2 / 2 for a Brownian bridge.
endpoint  v + weight |v| d g / |g|,  g = grad of sum_y q_y log p(y | x1) at the predicted endpoint x1 = E[x1 | x_t]
          Steering, not the gradient of any density: the classifier knows clean images only and sees a mean of them,
          and g is taken with respect to x1, not through the network. d = sum_y |q_y - p_y| / 2 in [0, 1] is how far
          the classifier still is from q, so that a sample that has arrived is left alone.
"""

from collections.abc import Callable, Sequence

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.path.base import Path

FORMS = ("endpoint", "score", "bridge")


def require_form(form: str, path: Path, *, sees_source: bool) -> None:
    """UserError where a guidance form does not fit a path, or a network that does or does not see the clean source."""
    name = type(path).__name__
    if form == "score" and path.from_data:
        raise UserError(
            f"translate.guidance.form=score: exact for a Gaussian source only, this flow's path is {name}; use "
            "form=endpoint, or bridge where the network sees the clean source"
        )
    if form == "bridge" and not (path.noise_on_every_sample and sees_source):
        raise UserError(
            f"translate.guidance.form=bridge: needs a path with noise on every sample (noised_source with probability "
            f"1, brownian) and condition.source_image=true; this flow has {name} and source_image={sees_source}. Use "
            "form=endpoint, or train such a flow"
        )
    if form == "endpoint" and not path.has_endpoint():
        raise UserError(
            f"translate.guidance.form=endpoint: the endpoint cannot be computed from a velocity of path {name} (the "
            "equation for it is singular on the way); use a noised_source, straight, brownian or gaussian_source path"
        )
    if form == "endpoint" and not path.straight and not sees_source:
        raise UserError(
            f"translate.guidance.form=endpoint: for path {name} it needs a network that sees the clean source; train "
            "with condition.source_image=true, or on a straight path"
        )


def pooled(log_probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """log p (B, num_classes) of several guides, each (B, num_classes), as of one: their logarithmic opinion pool
    (Genest & Zidek 1986).

    It is the geometric mean of their probabilities, brought back to a sum of 1. Without that the mean of log p sums to
    Z <= 1, less the more they disagree: its gradient is that of log p(y | .), which the exact forms need, and that of
    log Z, a pull to where the guides agree; and |q - p| of the endpoint form would never become 0.
    """
    return torch.stack(list(log_probabilities)).mean(0).log_softmax(1)


class ClassifierGuided:
    """A velocity steered toward soft labels by the gradient of a classifier (see the module's text for the forms).

    `log_probabilities(x, t, x0) -> (B, num_classes)` is the guide, differentiable in x; `labels` (B, num_classes) are
    the soft labels of the batch that this wrapper is called with. `start`: b(t) is bounded at its value there, and
    `endpoint` is off before. A call costs one classifier gradient. Fits what `require_form` lets pass.
    """

    def __init__(
        self,
        velocity: Callable,
        log_probabilities: Callable,
        path: Path,
        labels: torch.Tensor,
        *,
        form: str,
        weight: float,
        start: float,
    ):
        self._velocity, self._log_probabilities, self._path = velocity, log_probabilities, path
        self._labels, self._weight, self._start = labels, weight, start
        self._guide = self._to_endpoint if form == "endpoint" else self._along_score
        self._is_exact = form != "endpoint"
        self.forwards_per_call = getattr(velocity, "forwards_per_call", 1)
        self.gradients = 0

    def __call__(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        velocity = self._velocity(t, x, cond)
        velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))  # autocast may have halved it
        if self._weight == 0 or (not self._is_exact and bool((t < self._start).all())):
            return velocity
        self.gradients += 1
        return velocity + self._weight * self._guide(t, x, velocity, cond)

    def _gradient(self, x: torch.Tensor, t: torch.Tensor, x0: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """grad_x sum_y q_y log p(y | x), like x, and log p (B, num_classes)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self._log_probabilities(x, t, x0)
            (gradient,) = torch.autograd.grad((self._labels * log_p).sum(), x)
        return gradient, log_p.detach()

    def _along_score(self, t, x, velocity, cond) -> torch.Tensor:
        gradient, _ = self._gradient(x, t, cond.source_image)
        return self._path.score_factor(t.clamp_min(self._start)).view(-1, 1, 1, 1) * gradient

    def _to_endpoint(self, t, x, velocity, cond) -> torch.Tensor:
        end = self._path.endpoint(x, velocity, t, cond.source_image)
        gradient, log_p = self._gradient(end, t, None)
        size = velocity.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        distance = (self._labels - log_p.exp()).abs().sum(1) / 2
        step = size * distance * (t >= self._start)
        return step.view(-1, 1, 1, 1) * gradient

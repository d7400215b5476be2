"""Classifier-gradient guidance of a velocity.

Every form follows g = grad sum_y q_y log p(y | .), where q is a soft label and p a classifier, the guide. Where q is
one class, g is the gradient of log p(y | .). `weight` scales the step.

| form     | velocity                                                     | guide      | what it samples               |
|----------|--------------------------------------------------------------|------------|-------------------------------|
| score    | v(x, null) + weight b(t) g,  Gaussian source                 | p(y | x_t) | p(x1 | y), exact at weight 1  |
| bridge   | the same on a path from data, the network sees the clean x0  | of x_t, x0 | p(x1 | x0, y), exact likewise |
| sharpen  | v(x, condition) + weight b(t) g,  paths of score and bridge  | as theirs  | a class sharper than the data |
| endpoint | v(x, condition) + weight |v| d g / |g|  at x1 = E[x1 | x_t]  | p(y | x1)  | steering: no density          |

score and bridge  By Bayes, v(x | y) = v(x) + b(t) grad log p(y | x_t, t), where v(x) is the UNCONDITIONAL velocity.
          So the network is called with the null condition, which condition.dropout trains; the clean source image
          stays. The guide alone carries the label. b(t) = gamma (gamma / t - gamma'), gamma the noise of the path
          (`Path.score_factor`): (1 - t) / t for a Gaussian source, s^2 (1 - t) / t for a noised source, s^2 / 2 for a
          Brownian bridge. Noise must lie on every sample. Dhariwal & Nichol 2021, sec. 4, carried from scores to
          velocities.
sharpen   The network receives the target label and the guide adds the same label again. The class counts twice: of
          a mixture with class 1 = N(1, .6), mean and deviation become 1.38 and .43 (score: .99 and .60).
endpoint  The guide knows clean images only and sees a mean of them. g is taken with respect to x1, not through the
          network. d = sum_y |q_y - p_y| / 2 in [0, 1] is how far the guide still is from q, so that a sample that has
          arrived is left alone.
"""

from collections.abc import Callable, Sequence

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.path.base import Path

FORMS = ("endpoint", "score", "bridge", "sharpen")
EXACT = ("score", "bridge")  # the network is called with the null condition


def require_form(form: str, path: Path, *, sees_source: bool, dropout: float, scale: float) -> None:
    """UserError where a guidance form does not fit the flow.

    `sees_source`: the network sees the clean source image; `dropout`: share of the training samples without condition;
    `scale`: that of classifier-free guidance.
    """
    name, key = type(path).__name__, f"translate.guidance.form={form}"
    bridges = path.noise_on_every_sample and sees_source
    if form == "score" and path.from_data:
        raise UserError(
            f"{key}: needs a Gaussian source (path.name=gaussian_source), this flow's path is {name}; use "
            "form=endpoint, or bridge where the network sees the clean source"
        )
    if form == "bridge" and not bridges:
        raise UserError(
            f"{key}: needs a path with noise on every sample (noised_source with probability "
            f"1, brownian) and condition.source_image=true; this flow has {name} and source_image={sees_source}. Use "
            "form=endpoint, or train such a flow"
        )
    if form == "sharpen" and path.from_data and not bridges:
        raise UserError(
            f"{key}: needs path.name=gaussian_source, or a path with noise on every sample (noised_source with "
            f"probability 1, brownian) and condition.source_image=true; this flow has {name} and "
            f"source_image={sees_source}. Use form=endpoint, or train such a flow"
        )
    if form in EXACT and dropout == 0:
        raise UserError(
            f"{key}: needs the velocity without a condition, which this network never learned (condition.dropout=0); "
            "train with condition.dropout=0.1, or use form=sharpen or endpoint"
        )
    if form in EXACT and scale != 1:
        raise UserError(
            f"{key}: calls the network without a condition, so translate.guidance_scale={scale:g} has no part; leave "
            "it at 1, or use form=sharpen or endpoint"
        )
    if form == "endpoint" and not path.has_endpoint():
        raise UserError(
            f"{key}: the endpoint cannot be computed from a velocity of path {name} (the "
            "equation for it is singular on the way); use a noised_source, straight, brownian or gaussian_source path"
        )
    if form == "endpoint" and not path.straight and not sees_source:
        raise UserError(
            f"{key}: for path {name} it needs a network that sees the clean source; train "
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
        self._is_exact, self._steers_endpoint = form in EXACT, form == "endpoint"
        self.forwards_per_call = getattr(velocity, "forwards_per_call", 1)
        self.gradients = 0

    def __call__(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        velocity = self._velocity(t, x, cond.null() if self._is_exact else cond)
        velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))  # autocast may have halved it
        if self._weight == 0 or (self._steers_endpoint and bool((t < self._start).all())):
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

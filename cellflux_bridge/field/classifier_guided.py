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
from dataclasses import KW_ONLY, dataclass

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.base import Evaluation, evaluate
from cellflux_bridge.path.base import Path

FORMS = ("endpoint", "score", "bridge", "sharpen")
EXACT = ("score", "bridge")  # the network is called with the null condition


def require_form(form: str, path: Path, *, sees_source: bool, dropout: float, scale: float) -> None:
    """UserError where a guidance form does not fit the flow.

    `sees_source`: the network sees the clean source image; `dropout`: share of the training samples without condition;
    `scale`: that of classifier-free guidance.
    """
    key = f"translate.guidance.form={form}"
    noisy = "noise on every sample (noised_source with probability and colour 1, or brownian)"
    noisy += " and condition.source_image=true"
    bridges = path.noise_on_every_sample and path.white and sees_source
    needs, fits = {
        "score": ("path.name=gaussian_source", not path.from_data),
        "bridge": (noisy, bridges),
        "sharpen": (f"path.name=gaussian_source, or {noisy}", bridges or not path.from_data),
        "endpoint": (
            "a path on which the endpoint follows from the velocity (straight, noised_source, gaussian_source, or "
            "brownian with condition.source_image=true)",
            path.has_endpoint() and (path.straight or sees_source),
        ),
    }[form]
    if not fits:
        raise UserError(
            f"{key}: needs {needs}; this flow has path {type(path).__name__} and source_image={sees_source}. Choose "
            "another form, or train such a flow"
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


def pooled(log_probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """log p (B, num_classes) of several guides as of one: their logarithmic opinion pool (Genest & Zidek 1986).

    It is the geometric mean of their probabilities, scaled to a sum of 1. Without that scale, the gradient would also
    pull to where the guides agree, and |q - p| of the endpoint form would never become 0.
    """
    return torch.stack(list(log_probabilities)).mean(0).log_softmax(1)


@dataclass(frozen=True)
class ClassifierGuided:
    """A velocity steered toward soft labels by the gradients of classifiers; the module's text explains the forms.

    `guides` are log p (B, num_classes), differentiable in their first argument: of images as guide(x1) for form
    `endpoint`, of states as guide(x_t, t, x0) for the others. `labels` (B, num_classes) are the soft labels of the
    batch. `start`: b(t) is bounded at its value there, and `endpoint` is off before. A call costs one gradient of each
    guide. Use `require_form` first: it refuses what does not fit.
    """

    velocity: Callable
    guides: Sequence[Callable]
    path: Path
    labels: torch.Tensor
    _: KW_ONLY
    form: str
    weight: float
    start: float

    def __call__(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> Evaluation:
        found = evaluate(self.velocity, t, x, cond.null() if self.form in EXACT else cond)
        # Under autocast it may be of half precision.
        velocity = found.velocity.to(torch.promote_types(found.velocity.dtype, torch.float32))
        if self.weight == 0 or (self.form == "endpoint" and bool((t < self.start).all())):
            return found._replace(velocity=velocity)
        step = self._to_endpoint if self.form == "endpoint" else self._along_score
        velocity = velocity + self.weight * step(t, x, velocity, cond)
        return found._replace(velocity=velocity, gradients=found.gradients + len(self.guides))

    def _gradient(self, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """grad_x sum_y q_y log p(y | x, others), like x, and log p (B, num_classes)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = pooled([guide(x, *others) for guide in self.guides])
            (gradient,) = torch.autograd.grad((self.labels * log_p).sum(), x)
        return gradient, log_p.detach()

    def _along_score(self, t, x, velocity, cond) -> torch.Tensor:
        gradient, _ = self._gradient(x, t, cond.source_image)
        return self.path.score_factor(t.clamp_min(self.start)).view(-1, 1, 1, 1) * gradient

    def _to_endpoint(self, t, x, velocity, cond) -> torch.Tensor:
        gradient, log_p = self._gradient(self.path.endpoint(x, velocity, t, cond.source_image))
        size = velocity.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
        distance = (self.labels - log_p.exp()).abs().sum(1) / 2
        return (size * distance * (t >= self.start)).view(-1, 1, 1, 1) * gradient

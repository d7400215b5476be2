"""Classifier guidance: exact where it says so, against Gaussian mixtures in closed form, and steering elsewhere."""

import math

import pytest
import torch
from torch import nn
from toy_flow import sample

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.field.classifier_guided import EXACT, FORMS, ClassifierGuided, pooled, require_form
from cellflux_bridge.path.brownian import Brownian
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.smooth import Smooth
from cellflux_bridge.path.straight import Straight
from cellflux_bridge.transport.integrate import integrate

SCALE, START, CLASSES = 0.7, 0.02, 3
PATHS = {
    "straight": Straight(),
    "noised_source": NoisedSource(scale=SCALE),
    "noised_source_coin": NoisedSource(scale=SCALE, probability=0.5),
    "brownian": Brownian(scale=SCALE, margin=0.03),
    "smooth": Smooth(scale=SCALE),
    "gaussian_source": GaussianSource(),
}
# gamma and gamma' of the paths on which guidance is exact, written out once more.
NOISE = {
    "gaussian_source": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),
    "noised_source": (lambda t: SCALE * (1 - t), lambda t: -SCALE * torch.ones_like(t)),
    "brownian": (
        lambda t: SCALE * (t * (1 - t)).sqrt(),
        lambda t: SCALE * (1 - 2 * t) / (2 * (t * (1 - t)).sqrt()),
    ),
}
FACTOR = {
    "gaussian_source": lambda t: (1 - t) / t,
    "noised_source": lambda t: SCALE**2 * (1 - t) / t,
    "brownian": lambda t: torch.full_like(t, SCALE**2 / 2),
}
FORM = {"gaussian_source": "score", "noised_source": "bridge", "brownian": "bridge"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def image(rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, 2) as images (B, 1, 1, 2)."""
    return rows.view(len(rows), 1, 1, 2)


class Mixtures:
    """Images x1 (B, 1, 1, 2) of three classes, each a mixture of two Gaussians around what the clean source adds, and
    all that follows in closed form of x_t = base + t x1 + gamma eps."""

    def __init__(self, name: str):
        self.gamma, self.rate = NOISE[name]
        self.sees_source = name != "gaussian_source"
        self.means, self.deviations = normal(CLASSES, 2, 2), 0.2 + normal(CLASSES, 2, seed=1).abs()
        self.log_weights = normal(CLASSES, 2, seed=2).flatten().log_softmax(0).view(CLASSES, 2)

    def parts(self, t, x, x0):
        """For each class and component: the log of its joint density with x_t (B, 3, 2) and E[x1 | x_t] (B, 3, 2, 2);
        and what x_t holds of the source (B, 2)."""
        t = t.view(-1, 1, 1, 1)
        source = x0.view(-1, 1, 1, 2) if self.sees_source else torch.zeros(1, 1, 1, 2, dtype=t.dtype)
        means, deviations = self.means + 0.4 * source, self.deviations[..., None]
        residual = x.view(-1, 1, 1, 2) - (1 - t) * source - t * means
        variance = self.gamma(t) ** 2 + (t * deviations) ** 2
        log_joint = self.log_weights + (-0.5 * residual**2 / variance - 0.5 * (2 * math.pi * variance).log()).sum(-1)
        return log_joint, means + t * deviations**2 / variance * residual, source.view(-1, 2)

    def log_probabilities(self, x, t, x0):
        """log p(y | x_t, t), or log p(y | x_t, x0, t)."""
        return self.parts(t, x, x0)[0].logsumexp(2).log_softmax(1)

    def end(self, t, x, x0, label=None):
        """E[x1 | x_t], of one class or of all."""
        log_joint, ends, _ = self.parts(t, x, x0)
        chosen = slice(None) if label is None else slice(label, label + 1)
        weights = log_joint[:, chosen].flatten(1).softmax(1)
        return image((weights[..., None] * ends[:, chosen].flatten(1, 2)).sum(1))

    def velocity(self, t, x, x0, label=None):
        """E[d x_t / dt | x_t], of one class or of all."""
        end, source = self.end(t, x, x0, label), image(self.parts(t, x, x0)[2])
        s = t.view(-1, 1, 1, 1)
        eps = (x - (1 - s) * source - s * end) / self.gamma(s)
        return end - source + self.rate(s) * eps


def states(num: int = 40, *, low: float = 0.03, high: float = 0.97):
    """t (B,), x and x0 (B, 1, 1, 2), float64, and the condition."""
    t = torch.linspace(low, high, num, dtype=torch.float64)
    x, x0 = image(normal(num, 2, seed=3)), image(0.5 * normal(num, 2, seed=4))
    return t, x, x0, Condition(target_class=torch.zeros(num, dtype=torch.long), source_image=x0)


def one_hot(label: int, num: int) -> torch.Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[label].expand(num, -1)


def guided(name: str, labels: torch.Tensor, *, weight: float = 1.0, start: float = START) -> ClassifierGuided:
    exact = Mixtures(name)

    def velocity(t, x, cond):
        return exact.velocity(t, x, cond.source_image)

    return ClassifierGuided(
        velocity, [exact.log_probabilities], PATHS[name], labels, form=FORM[name], weight=weight, start=start
    )


# Exact forms


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("name", FORM)
def test_the_exact_forms_give_the_velocity_of_the_class(name, label):
    t, x, x0, cond = states()
    found = guided(name, one_hot(label, len(t)))(t, x, cond).velocity
    expected = Mixtures(name).velocity(t, x, x0, label)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (expected - Mixtures(name).velocity(t, x, x0)).abs().max() > 0.1


@pytest.mark.parametrize("name", FORM)
def test_the_closed_form_is_the_mean_of_the_paths_own_velocities(name):
    """The yardstick itself: u_t averaged over draws of the path whose x_t lie close together."""
    exact, num = Mixtures(name), 1_000_000
    x0 = torch.tensor([[0.5, -0.3]], dtype=torch.float64)
    component = torch.multinomial(exact.log_weights.flatten().exp(), num, replacement=True, generator=generator())
    means = exact.means + 0.4 * x0 * exact.sees_source
    x1 = means.view(-1, 2)[component] + exact.deviations.flatten()[component, None] * normal(num, 2, seed=7)
    t = torch.full((num,), 0.4, dtype=torch.float64)
    x_t, u_t = sample(PATHS[name], image(x0).expand(num, 1, 1, 2), image(x1), t, generator(5))
    here = x_t.mean(0)
    near = (x_t - here).flatten(1).norm(dim=1) < 0.08
    assert near.sum() > 3000
    expected = exact.velocity(t[:1], here[None], x0)
    torch.testing.assert_close(u_t[near].mean(0), expected[0], rtol=0, atol=0.06)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", FORM)
def test_a_soft_label_weighs_the_gradients_of_the_classes(name, weight):
    t, x, x0, cond = states()
    q = normal(len(t), CLASSES, seed=5).softmax(1)
    found = guided(name, q, weight=weight)(t, x, cond).velocity
    exact = Mixtures(name)
    plain = exact.velocity(t, x, x0)
    toward = sum(q[:, y].view(-1, 1, 1, 1) * (exact.velocity(t, x, x0, y) - plain) for y in range(CLASSES))
    torch.testing.assert_close(found, plain + weight * toward, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORM)
def test_before_the_start_the_factor_is_that_of_the_start(name):
    t, x, x0, cond = states(low=0.01, high=0.19)
    start = torch.full_like(t, 0.2)
    found = guided(name, one_hot(1, len(t)), start=0.2)(t, x, cond).velocity
    exact = Mixtures(name)
    plain = exact.velocity(t, x, x0)
    gradient = (exact.velocity(t, x, x0, 1) - plain) / FACTOR[name](t).view(-1, 1, 1, 1)
    expected = plain + FACTOR[name](start).view(-1, 1, 1, 1) * gradient
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORM)
def test_score_factors_follow_their_closed_forms(name):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(PATHS[name].score_factor(t), FACTOR[name](t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORM)
def test_the_factor_at_the_ends_of_the_way_is_a_number(name):
    t = torch.tensor([PATHS[name].t_start or START, 1.0])
    assert PATHS[name].score_factor(t).isfinite().all()


class TwoClasses(Mixtures):
    """One number (the second pixel is the same for both classes): class 0 is N(-1, .6), class 1 is N(1, .6)."""

    def __init__(self, name: str):
        super().__init__(name)
        self.means = torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
        self.deviations = torch.full((2, 1), 0.6, dtype=torch.float64)
        self.log_weights = torch.full((2, 1), math.log(0.5), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "form", "mean", "deviation"),
    [
        *((name, form, 0.99, 0.60) for name, form in FORM.items()),
        ("gaussian_source", "sharpen", 1.38, 0.43),
        ("noised_source", "sharpen", 1.38, 0.43),
        ("brownian", "sharpen", 1.28, 0.42),  # the start at t = .03 is of the class, so less counts twice
    ],
)
def test_a_velocity_with_condition_reaches_its_class_by_the_exact_forms_and_overshoots_by_sharpen(
    name, form, mean, deviation
):
    exact, num = TwoClasses(name), 2000

    def velocity(t, x, cond):
        label = None if cond.dropped is not None and cond.dropped.all() else 1
        return exact.velocity(t, x, cond.source_image, label)

    x0, labels = torch.zeros(num, 1, 1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[1].expand(num, -1)
    cond = Condition(target_class=torch.ones(num, dtype=torch.long), source_image=x0)
    field = ClassifierGuided(
        velocity, [exact.log_probabilities], PATHS[name], labels, form=form, weight=1.0, start=START
    )
    begin = PATHS[name].t_start
    x1 = image(exact.means[1] + 0.6 * normal(num, 2, seed=3))
    start = sample(PATHS[name], x0, x1, torch.full((num,), begin), generator()).x_t
    end = integrate(field, start, cond, steps=50, interval=(begin, 1.0)).states[-1][..., 0]
    assert end.mean().item() == pytest.approx(mean, abs=0.05)
    assert end.std().item() == pytest.approx(deviation, abs=0.03)


# Predicted endpoints


class Blends:
    """x_t = (1 - t) x0 + t x1 of sources that no one sees: x0 Gaussian, x1 a mixture, in closed form."""

    centre = torch.tensor([0.3, -0.5], dtype=torch.float64)

    def __init__(self, deviation: float):
        self.deviation, self.means = deviation, normal(4, 2)
        self.deviations = 0.2 + normal(4, 1, seed=1).abs()

    def ends(self, t, x):
        """E[x0 | x_t] and E[x1 | x_t]."""
        t = t.view(-1, 1, 1)
        residual = x.view(-1, 1, 2) - (1 - t) * self.centre - t * self.means
        variance = ((1 - t) * self.deviation) ** 2 + (t * self.deviations) ** 2
        weights = (-0.5 * residual**2 / variance - 0.5 * variance.log()).sum(-1).softmax(1)[..., None]
        x0 = self.centre + (1 - t) * self.deviation**2 / variance * residual
        x1 = self.means + t * self.deviations**2 / variance * residual
        return image((weights * x0).sum(1)), image((weights * x1).sum(1))


@pytest.mark.parametrize(("name", "deviation"), [("straight", 0.4), ("noised_source", math.hypot(0.4, SCALE))])
def test_the_endpoint_of_a_straight_path_is_the_mean_of_targets(name, deviation):
    t, x, *_ = states()
    x0, x1 = Blends(deviation).ends(t, x)
    torch.testing.assert_close(PATHS[name].endpoint(x, x1 - x0, t, None), x1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NOISE)
def test_the_endpoint_with_noise_is_the_mean_of_targets(name):
    t, x, x0, _ = states()
    exact = Mixtures(name)
    found = PATHS[name].endpoint(x, exact.velocity(t, x, x0), t, x0 if exact.sees_source else None)
    torch.testing.assert_close(found, exact.end(t, x, x0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["straight", "noised_source", "noised_source_coin", "brownian", "gaussian_source"])
def test_at_the_end_of_the_way_the_endpoint_is_the_state(name):
    _, x, x0, _ = states(4)
    velocity, ones = normal(4, 1, 1, 2, seed=8), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(PATHS[name].endpoint(x, velocity, ones, x0), x, rtol=0, atol=1e-12)


def test_only_the_smooth_path_has_no_endpoint():
    assert {name for name, path in PATHS.items() if not path.has_endpoint()} == {"smooth"}


# Steering at the endpoint


class Curved(nn.Module):
    """A small nonlinear classifier of images (B, 1, 1, 2), of any time and source."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = (nn.Parameter(normal(*shape, seed=6)) for shape in ((2, 8), (8, CLASSES)))

    def forward(self, x, t=None, x0=None):
        return (torch.tanh(x.flatten(1) @ self.inner) @ self.outer).log_softmax(1)


def toward(guide, q: torch.Tensor, x: torch.Tensor, *args) -> torch.Tensor:
    """The gradient of sum_y q_y log p(y | x) by central differences."""
    h, slopes = 1e-6, []
    with torch.no_grad():
        for pixel in torch.eye(2, dtype=torch.float64):
            up, down = ((q * guide(x + side * h * image(pixel[None]), *args)).sum(1) for side in (1, -1))
            slopes.append((up - down) / (2 * h))
    return image(torch.stack(slopes, dim=1))


def simple_velocity(t, x, cond):
    return torch.sin(2 * x) + t.view(-1, 1, 1, 1)


def steered(guide, labels, *, path="noised_source", form="endpoint", velocity=simple_velocity, **options):
    settings = {"weight": 0.6, "start": 0.1, **options}
    return ClassifierGuided(velocity, [guide], PATHS[path], labels, form=form, **settings)


@pytest.mark.parametrize("path", ["straight", "noised_source", "brownian", "gaussian_source"])
def test_the_endpoint_form_steps_along_the_gradient_by_a_share_of_the_velocity(path):
    (t, x, x0, cond), guide = states(low=0.1), Curved()
    q = normal(len(t), CLASSES, seed=5).softmax(1)
    plain = simple_velocity(t, x, cond)
    step = steered(guide, q, path=path)(t, x, cond).velocity - plain
    end = PATHS[path].endpoint(x, plain, t, x0)
    gradient, missing = toward(guide, q, end), (q - guide(end).exp()).abs().sum(1).detach() / 2
    size = step.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, 0.6 * plain.flatten(1).norm(dim=1) * missing, rtol=1e-9, atol=1e-12)
    directions = [(v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) for v in (step, gradient)]
    torch.testing.assert_close(*directions, rtol=1e-5, atol=1e-5)


def test_a_step_raises_what_it_follows():
    (t, x, x0, cond), guide = states(low=0.1), Curved()
    q = one_hot(2, len(t))
    velocity = steered(guide, q, weight=0.05)(t, x, cond).velocity
    before, after = (
        guide(PATHS["straight"].endpoint(x, v, t, x0))[:, 2] for v in (simple_velocity(t, x, cond), velocity)
    )
    assert (after > before).all()


def test_samples_before_the_start_are_not_steered_those_after_are():
    t, x, _, cond = states(8)
    t = torch.tensor([0.0, 0.5, 0.09, 0.1, 0.7, 0.05, 1.0, 0.11], dtype=torch.float64)
    step = (steered(Curved(), one_hot(0, 8))(t, x, cond).velocity - simple_velocity(t, x, cond)).flatten(1).norm(dim=1)
    assert ((step > 0) == (t >= 0.1)).all()


def test_a_sample_that_has_arrived_is_left_alone():
    (t, x, x0, cond), guide = states(low=0.1), Curved()
    plain = simple_velocity(t, x, cond)
    q = guide(PATHS["noised_source"].endpoint(x, plain, t, x0)).exp().detach()
    torch.testing.assert_close(steered(guide, q)(t, x, cond).velocity, plain, rtol=0, atol=1e-12)


def test_several_guides_are_one_classifier_whose_logits_are_the_mean_of_theirs():
    logits = normal(3, 5, CLASSES, seed=8) * 3
    found = pooled(list(logits.log_softmax(2)))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found, logits.mean(0).log_softmax(1))
    torch.testing.assert_close(pooled([logits[0].log_softmax(1)]), logits[0].log_softmax(1))


def test_a_guide_without_slope_and_a_velocity_of_zero_are_numbers():
    t, x, _, cond = states(low=0.1)
    flat = steered(lambda x: (0 * x.flatten(1).sum(1, keepdim=True)).expand(-1, 3).log_softmax(1), one_hot(0, 40))
    assert torch.equal(flat(t, x, cond).velocity, simple_velocity(t, x, cond))
    still = steered(Curved(), one_hot(0, 40), velocity=lambda t, x, cond: torch.zeros_like(x))
    assert torch.equal(still(t, x, cond).velocity, torch.zeros_like(x))


# What all forms share


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    """Of the classifier alone: for the endpoint form it is not taken through the velocity."""
    (t, x, x0, cond), guide = states(low=0.1), Curved()
    q = normal(len(t), CLASSES, seed=5).softmax(1)
    asked = []

    def asking(x, t=None, x0=None):
        asked.append((t, x0))
        scale = 1 if x0 is None else 1 + x0.flatten(1).sum(1, keepdim=True) ** 2
        return (guide(x) * scale).log_softmax(1)

    path = {"endpoint": "straight", "score": "gaussian_source"}.get(form, "brownian")
    found = steered(asking, q, path=path, form=form, weight=1.0)(t, x, cond).velocity - simple_velocity(t, x, cond)
    ((time, source),) = asked
    assert (time is t) == (source is x0) == (form != "endpoint")
    at = PATHS[path].endpoint(x, simple_velocity(t, x, cond), t, x0) if form == "endpoint" else x
    gradient = toward(asking, q, at, t, source)
    scale = found.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, scale.view(-1, 1, 1, 1) * gradient, rtol=1e-5, atol=1e-6)
    if form != "endpoint":
        torch.testing.assert_close(scale, FACTOR[path](t), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_is_the_velocity_itself_and_costs_nothing(form):
    t, x, _, cond = states()

    def never(x, t, x0):
        raise AssertionError("the guide was asked")

    velocity = steered(never, one_hot(0, len(t)), form=form, weight=0.0)
    assert torch.equal(velocity(t, x, cond).velocity, simple_velocity(t, x, cond))
    assert velocity(t, x, cond).gradients == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_does_not_depend_on_its_batch(form):
    (t, x, x0, cond), guide = states(low=0.01), Curved()
    q = normal(len(t), CLASSES, seed=5).softmax(1)
    together = steered(guide, q, form=form)(t, x, cond).velocity
    for i in (0, 3, 17, 39):  # of which the first is before the start
        rows = slice(i, i + 1)
        one = Condition(target_class=cond.target_class[rows], source_image=x0[rows])
        alone = steered(guide, q[rows], form=form)(t[rows], x[rows], one).velocity
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_velocities_of_half_precision_become_float32(dtype, expected, weight):
    t, x, _, cond = states()
    state, guide = (torch.float64, Curved()) if dtype == torch.float64 else (torch.float32, Curved().float())
    labels = one_hot(0, 40).to(state)
    velocity = steered(guide, labels, velocity=lambda t, x, cond: x.to(dtype), weight=weight)
    assert velocity(t.to(state), x.to(state), cond).velocity.dtype == expected


def test_guidance_leaves_no_gradient_in_the_classifier_and_no_graph():
    (t, x, _, cond), guide = states(), Curved()
    with torch.no_grad():
        assert not steered(guide, one_hot(0, 40))(t, x, cond).velocity.requires_grad
    assert all(parameter.grad is None for parameter in guide.parameters())


def heeding(t, x, cond):
    """A velocity with a known conditional and null answer."""
    dropped = torch.zeros(len(x), dtype=torch.bool) if cond.dropped is None else cond.dropped
    return x + torch.where(dropped, 0.0, 1.0 + cond.target_class).view(-1, 1, 1, 1)


@pytest.mark.parametrize("form", EXACT)
def test_exact_forms_call_the_network_without_a_condition(form):
    t, x, x0, cond = states(low=0.1)
    seen = []

    def velocity(t, x, cond):
        seen.append(cond)
        return x

    steered(Curved(), one_hot(1, len(t)), form=form, velocity=velocity)(t, x, cond)
    assert seen[0].dropped.all()
    assert seen[0].source_image is x0


@pytest.mark.parametrize("form", ["endpoint", "sharpen"])
def test_classifier_free_guidance_goes_inside(form):
    t, x, _, cond = states(low=0.1)
    q, guide = one_hot(1, len(t)), Curved()
    inside = ClassifierFree(heeding, 3.0)
    velocity = steered(guide, q, form=form, velocity=inside)
    alone = steered(guide, q, form=form, velocity=lambda t, x, cond: x + 3.0)  # null 0, class 0 at 1, scale 3
    torch.testing.assert_close(velocity(t, x, cond).velocity, alone(t, x, cond).velocity)
    assert velocity(t, x, cond)[1:] == (2, 1)


def test_each_guide_costs_a_gradient():
    t, x, _, cond = states(low=0.2)
    velocity = ClassifierGuided(
        simple_velocity, [Curved(), Curved()], Straight(), one_hot(0, 40), form="endpoint", weight=1.0, start=0.1
    )
    assert velocity(t, x, cond)[1:] == (1, 2)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("rk4", 4)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_forwards_and_gradients_are_counted_apart(solver, calls, scale):
    _, x, _, cond = states()
    velocity = steered(
        Curved().float(), one_hot(0, 40).float(), velocity=ClassifierFree(heeding, scale), form="sharpen"
    )
    for _ in range(2):  # a velocity may be used again
        result = integrate(velocity, x, cond, steps=5, solver=solver)
        assert result.nfe == 5 * calls * (1 if scale == 1 else 2)
        assert result.gradients == 5 * calls


def test_gradients_that_are_not_taken_are_not_counted():
    _, x, _, cond = states()
    velocity = steered(Curved().float(), one_hot(0, 40).float(), start=0.25)
    result = integrate(velocity, x, cond, steps=10, solver="euler")
    assert (result.nfe, result.gradients) == (10, 7)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"])
@pytest.mark.parametrize(
    ("path", "form"),
    [("brownian", "endpoint"), ("brownian", "bridge"), ("noised_source", "endpoint"), ("noised_source", "bridge"),
     ("gaussian_source", "score"), ("gaussian_source", "endpoint")],
)  # fmt: skip
def test_no_solver_meets_a_singular_time(path, form, solver):
    _, x, x0, cond = states(8)
    cond = Condition(target_class=cond.target_class, source_image=x0.float())
    velocity = steered(Curved().float(), one_hot(0, 8).float(), path=path, form=form)
    result = integrate(velocity, x, cond, steps=8, solver=solver, interval=(PATHS[path].t_start, 1.0))
    assert result.states.isfinite().all()
    assert result.states.abs().max() < 50


def test_steering_arrives_at_its_target():
    """A velocity of no class, steered to each of two ends: the more weight, the more the classifier agrees."""
    _, x, _, cond = states()

    def guide(x, t=None, x0=None):
        return torch.stack([-4 * x[..., 0].flatten(), 4 * x[..., 0].flatten(), -9 + 0 * x[..., 0].flatten()], 1)

    def reached(label, weight):
        velocity = steered(
            lambda *args: guide(*args).log_softmax(1),
            one_hot(label, 40).float(),
            weight=weight,
            velocity=simple_velocity,
        )
        end = integrate(velocity, x, cond, steps=20).states[-1]
        return guide(end).softmax(1)[:, label].mean().item()

    for label in (0, 1):
        assert reached(label, 0.0) < reached(label, 0.3) < reached(label, 1.0)


# Refusals

EXACT_FLOWS = {
    "score": {("gaussian_source", False), ("gaussian_source", True)},
    "bridge": {("noised_source", True), ("brownian", True)},
}
ALLOWED = {
    **EXACT_FLOWS,
    "sharpen": EXACT_FLOWS["score"] | EXACT_FLOWS["bridge"],
    "endpoint": {
        *((name, sees) for name in PATHS if name not in ("smooth", "brownian") for sees in (False, True)),
        ("brownian", True),
    },
}


@pytest.mark.parametrize("sees_source", [False, True])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_do_not_fit_are_refused_by_name(form, name, sees_source):
    def require():
        require_form(form, PATHS[name], sees_source=sees_source, dropout=0.1, scale=1.0)

    if (name, sees_source) in ALLOWED[form]:
        require()
        return
    message = {
        "score": "gaussian_source",
        "bridge": "noise on every",
        "sharpen": "gaussian.*noise",
        "endpoint": "from the",
    }
    with pytest.raises(
        UserError, match=rf"form={form}: needs .*{message[form]}.*source_image={sees_source}"
    ) as refused:
        require()
    assert type(PATHS[name]).__name__ in str(refused.value)


@pytest.mark.parametrize("form", ["bridge", "sharpen"])
def test_forms_of_the_score_need_white_noise(form):
    options = {"sees_source": True, "dropout": 0.1, "scale": 1.0}
    with pytest.raises(UserError, match="colour 1"):
        require_form(form, NoisedSource(colour=0.5), **options)
    require_form("endpoint", NoisedSource(colour=0.5), **options)


@pytest.mark.parametrize(
    ("dropout", "scale", "message"), [(0, 1.0, r"condition\.dropout=0"), (0.1, 1.5, r"guidance_scale=1\.5 has no part")]
)
@pytest.mark.parametrize("form", FORMS)
def test_exact_forms_need_a_trained_null_and_no_scale(form, dropout, scale, message):
    path = PATHS["gaussian_source" if form == "score" else "brownian"]
    options = {"sees_source": True, "dropout": dropout, "scale": scale}
    if form in EXACT:
        with pytest.raises(UserError, match=rf"form={form}: .*{message}"):
            require_form(form, path, **options)
    else:
        require_form(form, path, **options)

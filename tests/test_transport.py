"""Integration and the path method: closed-form velocities, ends that frames never move, samples that stand alone."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from toy_flow import mixing, sources, two_classes

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionSpec, Names
from cellflux_bridge.condition.source_class import SourceClass
from cellflux_bridge.condition.target_class import TargetClass
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.path.brownian import Brownian
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.smooth import Smooth
from cellflux_bridge.path.straight import Straight
from cellflux_bridge.transport.base import at_trained_times, source_noise
from cellflux_bridge.transport.integrate import frame_times, integrate
from cellflux_bridge.transport.path import Path as PathTransport
from cellflux_bridge.velocity.unet import UNet

NAMES = Names(("A", "B"))
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
FORWARDS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
AWKWARD = (7, 25, 49)


def state(num: int = 3, size: int = 4) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def classes(num: int) -> Condition:
    return Condition(target_class=torch.arange(num) % 2, source_class=(torch.arange(num) + 1) % 2)


def linear(t, x, cond):
    """dx/dt = -2 x + 3 t, whose solution is `linear_solution`."""
    return -2 * x + 3 * t.view(-1, 1, 1, 1)


def linear_solution(x0: torch.Tensor, t: float) -> torch.Tensor:
    return (x0.double() + 0.75) * math.exp(-2 * t) + 1.5 * t - 0.75


def wavy(t, x, cond):
    """A velocity without closed form in which all pixels of a sample matter to each other."""
    return torch.sin(3 * x + t.view(-1, 1, 1, 1)) - x.mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    spec = ConditionSpec((TargetClass(NAMES, 3), SourceClass(NAMES, 3)))
    unet = UNet(3, spec, channels=8, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=4, predict="velocity")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return unet.eval()


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, 0

    def __call__(self, t, x, cond):
        self.calls += 1
        assert t.shape == (len(x),)
        return self.velocity(t, x, cond)


@pytest.mark.parametrize("solver", ORDERS)
def test_fixed_steps_converge_with_their_order(solver):
    x, errors = state(), []
    for steps in (4, 8):
        result = integrate(linear, x, None, steps=steps, solver=solver)
        errors.append((result.states[-1] - linear_solution(x, 1.0)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.5)
    assert errors[1] < 0.2


def test_dopri5_stays_within_its_tolerance():
    x = state()
    result = integrate(linear, x, None, solver="dopri5", frames=5, tolerance=1e-5)
    for t, found in zip(result.times.tolist(), result.states, strict=True):
        torch.testing.assert_close(found, linear_solution(x, t).float(), rtol=0, atol=2e-4)
    assert result.times.tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_frames_lie_on_the_solution(solver):
    x = state()
    result = integrate(linear, x, None, steps=200, frames=11, solver=solver)
    for t, found in zip(result.times.tolist(), result.states, strict=True):
        torch.testing.assert_close(found, linear_solution(x, t).float(), rtol=0, atol=0.05)


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_straight_lines_are_exact(solver):
    x, direction = state(), state().flip(0)
    result = integrate(lambda t, x, cond: direction, x, None, steps=7, frames=4, solver=solver)
    for t, found in zip(result.times.tolist(), result.states, strict=True):
        torch.testing.assert_close(found, x + t * direction, rtol=0, atol=1e-5)


def ends(velocity, x, cond, *, steps, **options):
    """What integration ends with, for several numbers of frames."""
    for frames in sorted({2, steps // 2, min(33, steps + 1), steps + 1}):
        yield integrate(velocity, x, cond, steps=steps, frames=frames, **options)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("steps", AWKWARD)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.02, 1.0), (1.0, 0.0)])
def test_the_number_of_frames_never_moves_the_end(solver, steps, interval):
    first, *others = ends(wavy, state(2), None, steps=steps, solver=solver, interval=interval)
    assert (first.states[-1] - state(2)).abs().max() > 0.1
    for other in others:
        assert torch.equal(other.states[-1], first.states[-1])
        assert other.nfe == first.nfe


def test_the_number_of_frames_never_moves_a_networks_end(network):
    two, many = (integrate(network, state(2), classes(2), steps=32, frames=frames).states[-1] for frames in (2, 33))
    assert torch.equal(two, many)


@pytest.mark.parametrize("steps", AWKWARD)
def test_frames_are_states_of_the_grid_at_their_times(steps):
    x = state(2)
    whole = integrate(wavy, x, None, steps=steps, frames=steps + 1)
    torch.testing.assert_close(whole.times, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    for frames in range(2, steps + 1, 5):
        some = integrate(wavy, x, None, steps=steps, frames=frames)
        places = (some.times * steps).round().long()
        assert len(some.states) == len(some.times) == frames
        assert torch.equal(some.states, whole.states[places])
        assert (some.times - torch.linspace(0, 1, frames, dtype=torch.float64)).abs().max() <= 0.5 / steps + 1e-12
        assert (some.times.diff() > 0).all()


@pytest.mark.parametrize("solver", ["midpoint", "heun2", "rk4"])
def test_backward_undoes_forward(solver):
    x = state(2)
    there = integrate(wavy, x, None, steps=40, solver=solver).states[-1]
    back = integrate(wavy, there, None, steps=40, solver=solver, interval=(1.0, 0.0))
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(back.states[-1], x, rtol=0, atol=2e-3)
    assert back.times.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.02, 1.0), (1.0, 0.0)])
def test_times_given_to_the_velocity_stay_inside_the_interval(interval):
    seen = []

    def note(t, x, cond):
        seen.extend(t.tolist())
        return x

    integrate(note, state(), None, steps=49, solver="heun2", interval=interval)
    low, high = sorted(interval)
    assert min(seen) >= low - 1e-7
    assert max(seen) <= high + 1e-7
    assert seen[0] == pytest.approx(interval[0])
    assert seen[-1] == pytest.approx(interval[1])


@pytest.mark.parametrize("solver", ORDERS)
def test_a_sample_does_not_depend_on_its_batch(network, solver):
    x, cond = state(8, size=8), classes(8)
    together = integrate(network, x, cond, steps=3, frames=3, solver=solver).states
    for i in (0, 5):
        one = Condition(target_class=cond.target_class[i : i + 1], source_class=cond.source_class[i : i + 1])
        alone = integrate(network, x[i : i + 1], one, steps=3, frames=3, solver=solver).states
        torch.testing.assert_close(alone, together[:, i : i + 1], rtol=0, atol=3e-6)


@pytest.mark.parametrize("solver", [*FORWARDS, "dopri5"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_network_forwards_are_counted(network, solver, scale):
    velocity = Counted(ClassifierFree(network, scale))
    result = integrate(velocity, state(2), classes(2), steps=3, frames=4, solver=solver)
    per_call = 1 if scale in (0, 1) else 2
    assert result.nfe == velocity.calls * per_call
    if solver in FORWARDS:
        assert result.nfe == 3 * FORWARDS[solver] * per_call


def test_more_frames_than_states_are_refused():
    with pytest.raises(UserError, match=r"frames=9: 7 steps have 8 states; raise translate.steps to at least 8"):
        integrate(linear, state(), None, steps=7, frames=9)
    assert len(frame_times(steps=7, frames=9, solver="dopri5")) == 9


@pytest.mark.parametrize("solver", ORDERS)
def test_the_state_stays_float32_under_a_bfloat16_velocity(solver):
    x = torch.full((1, 1, 1, 1), 4.0, dtype=torch.bfloat16)  # a step of 0.01 is lost in a bfloat16 state near 4
    speed = torch.full_like(x, 1.0078125)
    result = integrate(lambda t, x, cond: speed, x, None, steps=100, solver=solver)
    assert result.states.dtype == torch.float32
    assert result.states[-1].item() == pytest.approx(5.0078125, abs=1e-4)


def test_integration_keeps_no_graph(network):
    assert not integrate(network, state(2).requires_grad_(), classes(2), steps=2).states.requires_grad


# The path method


PATHS = {
    "straight": Straight(),
    "noised_source": NoisedSource(scale=0.5),
    "brownian": Brownian(scale=0.5, margin=0.03),
    "smooth": Smooth(scale=0.5),
}


def along(velocity, path, x0, cond, *, noise, **settings):
    return PathTransport(**settings).along(velocity, path, x0, cond, noise=noise)


def levels_of(path, **settings) -> tuple[float, ...]:
    return PathTransport(**settings).levels(SimpleNamespace(path=path), None)


def true_velocity(path, x0, x1, noise):
    """The conditional velocity toward x1 of the one path that starts at x0 with this noise."""

    def velocity(t, x, cond):
        h = 1e-4
        t = t.double().clamp(max=1 - h)
        forward, backward = ((path.noise_scale(s)).view(-1, 1, 1, 1) for s in (t + h, (t - h).clamp_min(0)))
        slope = (forward - backward) / ((t + h) - (t - h).clamp_min(0)).view(-1, 1, 1, 1)
        moving = 0 if isinstance(path, Smooth) else slope * noise
        return x1 - x0 + moving

    return velocity


@pytest.mark.parametrize("name", PATHS)
def test_a_known_velocity_carries_the_source_to_the_target_without_noise(name):
    path, x0, x1 = PATHS[name], state(4).clamp(-1, 1), state(4).flip(0).clamp(-1, 1)
    noise = source_noise(x0.shape[1:], list("abcd"), seed=0)
    result = along(true_velocity(path, x0, x1, noise), path, x0, None, noise=noise, steps=400, frames=5, solver="rk4")
    levels = levels_of(path, steps=400, frames=5, solver="rk4")
    assert torch.equal(result.frames[0], x0)
    # A path that starts later than 0 starts at x0, a margin short of the blend it stands for. At the end a share of the
    # noise is left, scale sqrt(margin) / 2, since the velocity is evaluated at trained times only.
    left = 0.5 * path.margin**0.5 / 2 * noise.abs().max().item()
    tolerance = 0.02 + 2 * path.t_start + left
    for level, frame in zip(levels[1:], result.frames[1:], strict=True):
        torch.testing.assert_close(frame, (1 - level) * x0 + level * x1, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", PATHS)
def test_frame_zero_is_the_source_and_the_end_is_the_integrals(network, name):
    path, x0, cond = PATHS[name], state(2), classes(2)
    noise = source_noise(x0.shape[1:], ["a", "b"], seed=0)
    result = along(network, path, x0, cond, noise=noise, steps=6, frames=4)
    field = at_trained_times(network, path)
    end = integrate(field, path.start(x0, noise), cond, steps=6, interval=(path.t_start, 1.0)).states[-1]
    assert torch.equal(result.frames[0], x0)
    assert torch.equal(result.frames[-1], end)
    assert result.frames.dtype == torch.float32
    assert result.nfe == 12


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_a_network_is_evaluated_at_the_times_of_its_training_only(solver):
    path, times = PATHS["brownian"], []

    def velocity(t, x, cond):
        times.extend(t.tolist())
        return -x

    along(velocity, path, state(2), None, noise=state(2), steps=30, frames=2, solver=solver)
    assert min(times) == pytest.approx(0.03)
    assert max(times) <= 0.97 + 1e-6
    assert len(set(times)) > 3


def test_noise_belongs_to_the_source_not_to_its_batch():
    together = source_noise((3, 4, 4), ["a", "b", "c"], seed=5)
    assert torch.equal(together, source_noise((3, 4, 4), ["c", "b", "a"], seed=5).flip(0))
    assert torch.equal(together[1:2], source_noise((3, 4, 4), ["b"], seed=5))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, source_noise((3, 4, 4), ["a", "b", "c"], seed=6))
    many = source_noise((3, 16, 16), [str(i) for i in range(50)], seed=5)
    assert many.mean().item() == pytest.approx(0, abs=0.02)
    assert many.std().item() == pytest.approx(1, abs=0.02)


def test_a_path_does_not_depend_on_its_batch(network):
    path, x0, cond, ids = PATHS["noised_source"], state(3, size=8), classes(3), ["a", "b", "c"]
    noise = source_noise(x0.shape[1:], ids, seed=1)
    together = along(network, path, x0, cond, noise=noise, steps=4, frames=3)
    one = Condition(target_class=cond.target_class[2:], source_class=cond.source_class[2:])
    noise = source_noise(x0.shape[1:], ["c"], seed=1)
    alone = along(network, path, x0[2:], one, noise=noise, steps=4, frames=3)
    torch.testing.assert_close(alone.frames, together.frames[:, 2:], rtol=0, atol=3e-6)


def test_the_reverse_of_a_straight_path_returns_to_the_start(network):
    x0, cond = state(2), classes(2)
    zero = torch.zeros_like(x0)
    there = along(network, Straight(), x0, cond, noise=zero, steps=20, frames=2).frames[-1]
    back = along(network, Straight(), there, cond, noise=zero, steps=20, frames=5, reverse=True)
    torch.testing.assert_close(back.frames[-1], x0, rtol=0, atol=2e-3)
    assert torch.equal(back.frames[0], there)
    assert levels_of(Straight(), steps=40, frames=5, solver="midpoint", reverse=True) == (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize("name", ["noised_source", "brownian", "smooth"])
def test_noisy_paths_refuse_the_reverse(network, name):
    options = {"steps": 4, "frames": 2, "solver": "euler", "reverse": True}
    with pytest.raises(UserError, match=r"translate\.reverse.*train the opposite transition"):
        along(network, PATHS[name], state(1), classes(1), noise=state(1), **options)
    with pytest.raises(UserError, match=r"translate\.reverse"):
        levels_of(PATHS[name], **options)


def test_a_path_from_noise_carries_no_image(network):
    with pytest.raises(UserError, match="starts from noise"):
        along(network, GaussianSource(), state(1), classes(1), noise=state(1))
    with pytest.raises(UserError, match="starts from noise"):
        levels_of(GaussianSource(), steps=4, frames=2, solver="euler")


def test_levels_rise_from_zero_to_one():
    for path in PATHS.values():
        for steps, frames in ((25, 11), (25, 26), (7, 3), (49, 33)):
            levels = levels_of(path, steps=steps, frames=frames, solver="midpoint")
            assert levels[0] == 0
            assert levels[-1] == 1
            assert all(a < b for a, b in itertools.pairwise(levels))


def test_the_last_time_is_exactly_one_for_any_margin():
    for margin in torch.linspace(0.001, 0.499, 97).tolist():
        times = frame_times(steps=7, frames=4, solver="euler", interval=(margin, 1.0))
        assert times[-1].item() == 1.0  # above 1 the Brownian noise scale would be the root of a negative number


# Intervals of each sample's own


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"])
def test_intervals_of_samples_are_those_of_single_runs(solver):
    x, cond = (
        sources(4),
        Condition(level=two_classes(torch.tensor([0.2, 0.5, 0.9, 1.0])), source_image=sources(4).flip(0)),
    )
    begin, end = torch.tensor([0.0, 0.3, 1.0, 0.02]), torch.tensor([1.0, 0.9, 0.4, 1.0])
    together = integrate(mixing, x, cond, steps=6, frames=3, solver=solver, interval=(begin, end), tolerance=1e-6)
    assert together.states.shape == (3, *x.shape)
    assert together.times.shape == (3, 4)
    for i in range(4):
        one = Condition(level=cond.level[i : i + 1], source_image=cond.source_image[i : i + 1])
        interval = (begin[i].item(), end[i].item())
        alone = integrate(
            mixing, x[i : i + 1], one, steps=6, frames=3, solver=solver, interval=interval, tolerance=1e-6
        )
        tolerance = 1e-4 if solver == "dopri5" else 3e-6
        torch.testing.assert_close(together.states[:, i : i + 1], alone.states, rtol=0, atol=tolerance)
        torch.testing.assert_close(together.times[:, i], alone.times)
        if solver != "dopri5":
            assert together.nfe == alone.nfe

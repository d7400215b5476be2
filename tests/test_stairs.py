"""Stairs: every frame is the end of an integration of its own, told and guided as its level says."""

import pytest
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.field.classifier_guided import ClassifierGuided
from cellflux_bridge.path.brownian import Brownian
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.smooth import Smooth
from cellflux_bridge.path.straight import Straight
from cellflux_bridge.transport import stairs
from cellflux_bridge.transport.integrate import integrate
from cellflux_bridge.transport.path import source_noise
from cellflux_bridge.transport.stairs import Field, condition_for, equidistant_levels

FROM_DATA = {
    "straight": Straight(),
    "noised_source": NoisedSource(scale=0.5),
    "brownian": Brownian(scale=0.5, margin=0.03),
    "smooth": Smooth(scale=0.5),
}
LEVELS = torch.tensor([0.2, 0.5, 0.9, 1.0])


def two_classes(levels: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - levels, levels], dim=-1)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def sources(num: int = 5) -> torch.Tensor:
    return torch.randn(num, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def noise_of(num: int = 5) -> torch.Tensor:
    return source_noise((3, 4, 4), [str(i) for i in range(num)], seed=1)


class Recorded:
    """A velocity that notes its calls."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, t, x, cond):
        self.calls.append((t, x, cond))
        return self.velocity(t, x, cond)


def field_of(velocity, guided=None) -> Field:
    """A field told the level and the source image; `guided(wanted)` is its guided velocity, else the plain one."""
    return Field(
        lambda x0, told: Condition(level=told, source_image=x0), guided or (lambda wanted: velocity), plain=velocity
    )


def drawn_to_level(t, x, cond):
    """dx/dt = -2 (x - c), whose solution comes from x to c + (x - c) exp(-2 t)."""
    return -2 * (x - column(cond.level[:, 1]))


def climb(field: Field, path, x0: torch.Tensor, levels: torch.Tensor = LEVELS, **options) -> stairs.Stair:
    settings = {"noise": noise_of(len(x0)), "steps": 6, "solver": "midpoint", "batch_size": 64, **options}
    labels = two_classes(levels)
    return stairs.progression(field, path, x0, **{"told": labels, "wanted": labels, **settings})


# Progression


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_progression_reaches_what_each_level_is_told(name):
    path, x0 = FROM_DATA[name], sources()
    found = climb(field_of(drawn_to_level), path, x0, steps=40, solver="rk4")
    start = path.start(x0, noise_of())
    assert found.frames.shape == (5, 5, 3, 4, 4)
    assert found.frames.dtype == torch.float32
    assert torch.equal(found.frames[0], x0)
    decay = torch.tensor(-2.0 * (1 - path.t_start)).exp()
    for level, frame in zip(LEVELS, found.frames[1:], strict=True):
        torch.testing.assert_close(frame, level + (start - level) * decay, rtol=0, atol=1e-5)


def test_what_is_told_and_what_is_wanted_are_different_things():
    """Calibration tells the network another level than the guide is given."""

    def guided(wanted):
        return lambda t, x, cond: drawn_to_level(t, x, cond) + 0.6 * column(wanted[:, 1])

    x0, told = sources(), torch.tensor([0.7, 0.1, 0.4, 0.0])
    found = climb(
        field_of(drawn_to_level, guided), Straight(), x0, told=two_classes(told), steps=40, solver="rk4", batch_size=3
    )
    for s, c, frame in zip(LEVELS, told, found.frames[1:], strict=True):
        goal = c + 0.3 * s
        torch.testing.assert_close(frame, goal + (x0 - goal) * torch.tensor(-2.0).exp(), rtol=0, atol=1e-5)


def test_all_levels_of_a_source_start_from_the_same_noise_and_see_its_clean_image():
    velocity, path, x0 = Recorded(drawn_to_level), FROM_DATA["brownian"], sources()
    climb(field_of(velocity), path, x0, steps=1, solver="euler")
    ((t, x, cond),) = velocity.calls  # one batch
    assert torch.equal(x.view(4, *x0.shape), path.start(x0, noise_of()).expand(4, *x0.shape))
    assert torch.equal(cond.source_image.view(4, *x0.shape), x0.expand(4, *x0.shape))
    assert (t == path.t_start).all()
    assert torch.equal(cond.level, two_classes(LEVELS).repeat_interleave(5, 0))


def mixing(t, x, cond):
    """A velocity without closed form in which all pixels of a sample matter to each other."""
    return torch.sin(3 * x + column(t)) - x.mean((1, 2, 3), keepdim=True) * column(cond.level[:, 1]) + cond.source_image


def guide(x, t, x0):
    logits = torch.stack([x[:, 0].mean((1, 2)), (x[:, 1] ** 2).mean((1, 2))], dim=1)
    return (3 * logits).log_softmax(1)


def steered(form: str, path, velocity=mixing):
    return lambda wanted: ClassifierGuided(velocity, guide, path, wanted, form=form, weight=0.5, start=0.05)


def inverted(field: Field, path, x0, renewed, *, source: float = 0.0, **how) -> stairs.Inversion:
    how = {"steps": 6, "solver": "midpoint", "batch_size": 64, **how}
    states, _ = stairs.invert(field, path, x0, source=two_classes(torch.tensor([source]))[0], **how)
    return stairs.Inversion(states, torch.as_tensor(renewed))


@pytest.mark.parametrize("name", FROM_DATA)
def test_from_inverted_noise_a_source_comes_back_when_its_own_level_is_told(name):
    told, how = two_classes(torch.tensor([0.3, 0.3, 0.8, 1.0])), {"steps": 60, "solver": "rk4"}
    field, path, x0 = field_of(mixing), FROM_DATA[name], sources()
    inversion = inverted(field, path, x0, [0.0] * 4, source=0.3, **how)
    found = climb(field, path, x0, told=told, inversion=inversion, **how)
    torch.testing.assert_close(found.frames[1], x0, rtol=0, atol=1e-5)
    assert (found.frames[3] - x0).abs().max() > 0.05
    random = climb(field, path, x0, told=told, **how)
    assert (random.frames[1] - x0).abs().max() > 0.05


def test_an_inversion_costs_one_way_whatever_the_batches():
    path = FROM_DATA["noised_source"]
    how = {"source": torch.tensor([1.0, 0.0]), "steps": 7, "solver": "midpoint"}
    whole, forwards = stairs.invert(field_of(mixing), path, sources(), batch_size=64, **how)
    parts, as_many = stairs.invert(field_of(mixing), path, sources(), batch_size=2, **how)
    assert forwards == as_many == 14
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_inverted_noise_turns_into_random_noise():
    """Of dx/dt = -2 (x - c) back from x0, told 0: x(0) = x0 exp(2); a turn of a quarter times `renewed`."""
    path, x0, how = FROM_DATA["noised_source"], sources(), {"steps": 40, "solver": "rk4"}
    inversion = inverted(field_of(drawn_to_level), path, x0, [0.0, 0.5, 1.0], **how)
    velocity = Recorded(drawn_to_level)
    climb(field_of(velocity), path, x0, torch.tensor([0.2, 0.5, 1.0]), inversion=inversion, **how)
    start = velocity.calls[0][1].view(3, *x0.shape)
    own, random = x0 * (torch.tensor(2.0).exp() - 1), 0.5 * noise_of()
    half = torch.tensor(0.5).sqrt()
    for found, expected in zip(start, (own, half * (own + random), random), strict=True):
        torch.testing.assert_close(found, x0 + expected, rtol=0, atol=1e-4)


def test_sources_may_be_told_levels_of_their_own():
    path, x0 = FROM_DATA["noised_source"], sources()
    each = torch.linspace(0, 1, 20).view(4, 5)
    field = field_of(mixing)
    together = climb(field, path, x0, told=two_classes(each), inversion=inverted(field, path, x0, each))
    for b in range(5):
        own = climb(
            field, path, x0[b : b + 1], told=two_classes(each[:, b]), noise=noise_of()[b : b + 1],
            inversion=inverted(field, path, x0[b : b + 1], each[:, b]),
        )  # fmt: skip
        torch.testing.assert_close(together.frames[:, b], own.frames[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("renewed", [None, [0.1, 0.4, 0.8, 1.0]], ids=["random", "inverted"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 19, 20])
def test_chunks_never_change_a_progression(batch_size, renewed):
    path = FROM_DATA["noised_source"]
    field = field_of(mixing, steered("bridge", path))
    inversion = None if renewed is None else inverted(field, path, sources(), renewed)
    whole, parts = (climb(field, path, sources(), batch_size=size, inversion=inversion) for size in (64, batch_size))
    torch.testing.assert_close(parts.frames, whole.frames, rtol=0, atol=1e-5)
    assert parts[1:] == whole[1:]


def test_no_more_rows_than_the_batch_size_are_seen_at_once():
    velocity = Recorded(mixing)
    climb(field_of(velocity), Straight(), sources(), batch_size=7)
    assert [len(x) for _, x, _ in velocity.calls[::12]] == [7, 7, 6]


@pytest.mark.parametrize("form", ["endpoint", "bridge"])
def test_a_frame_is_that_of_its_level_alone(form):
    path, x0 = FROM_DATA["noised_source"], sources()
    field = field_of(mixing, steered(form, path))
    together = climb(field, path, x0)
    for k in range(len(LEVELS)):
        alone = climb(field, path, x0, LEVELS[k : k + 1])
        torch.testing.assert_close(alone.frames[1], together.frames[k + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(together.frames[1], together.frames[4], atol=1e-2)


def test_a_source_alone_is_the_same_as_in_a_batch():
    path, x0 = FROM_DATA["noised_source"], sources()
    field = field_of(mixing, steered("endpoint", path))
    together, alone = climb(field, path, x0), climb(field, path, x0[3:4], noise=noise_of()[3:4])
    torch.testing.assert_close(alone.frames, together.frames[:, 3:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_progression_costs_all_its_levels(solver, calls, scale):
    path = FROM_DATA["noised_source"]
    inside = ClassifierFree(mixing, scale)
    plain = climb(field_of(inside), path, sources(), solver=solver)
    assert (plain.nfe, plain.gradients) == (4 * 6 * calls * (1 if scale == 1 else 2), 0)
    found = climb(field_of(inside, steered("bridge", path, inside)), path, sources(), solver=solver, batch_size=3)
    assert (found.nfe, found.gradients) == (plain.nfe, 4 * 6 * calls)


def test_a_solver_that_chooses_its_steps_costs_what_its_chunks_cost_together():
    velocity = Recorded(lambda t, x, cond: 40 * column(cond.level[:, 1]) * (column(cond.level[:, 1]) - x))
    found = climb(field_of(velocity), Straight(), sources(), solver="dopri5", batch_size=5)  # a chunk is a level
    calls = [len(x) for _, x, _ in velocity.calls]
    assert set(calls) == {5}
    assert found.nfe == len(calls)


def test_the_source_image_is_left_as_it_is():
    x0 = sources()
    before = x0.clone()
    climb(field_of(drawn_to_level), FROM_DATA["noised_source"], x0)
    assert torch.equal(x0, before)


# Depth


DEVIATION = 0.4
MEANS = torch.tensor([-0.5, 0.8])


def normal_velocity(t, x, cond):
    """The velocity of a Gaussian-source path whose targets of level c are normal: mean between MEANS, one deviation."""
    t, mean = column(t), column(cond.level.to(x) @ MEANS.to(x))
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    return mean + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * mean)


def carried(x: torch.Tensor, source: float, level: float, depth: float) -> torch.Tensor:
    """Where its ODE goes: states keep their place, in deviations, around t times the mean of their level."""
    means = MEANS[0] + torch.tensor([source, level]) * (MEANS[1] - MEANS[0])
    t = 1 - depth
    deviation = ((1 - t) ** 2 + (t * DEVIATION) ** 2) ** 0.5
    state = t * means[0] + deviation / DEVIATION * (x - means[0])
    return means[1] + DEVIATION / deviation * (state - t * means[1])


def descend(field: Field, x0: torch.Tensor, levels, depths, *, source: float = 0.0, **options) -> stairs.Stair:
    labels = two_classes(torch.as_tensor(levels))
    settings = {"steps": 30, "solver": "midpoint", "batch_size": 64, "told": labels, "wanted": labels, **options}
    return stairs.depth(
        field,
        GaussianSource(),
        x0,
        source=two_classes(torch.tensor([source]))[0],
        depths=torch.as_tensor(depths),
        **settings,
    )


@pytest.mark.parametrize("source", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    ("levels", "depths"),
    [
        ([1.0, 1.0, 1.0], [0.2, 0.55, 1.0]),  # rising depths, one level: Cellflow's stair
        ([0.3, 0.6, 1.0], [1.0, 1.0, 1.0]),  # full depth, rising levels: invert and regenerate
        ([0.25, 0.5, 1.0], [0.25, 0.5, 0.5]),  # both rise
    ],
)
def test_a_depth_stair_of_normal_laws_follows_its_closed_form(levels, depths, source):
    x0 = sources()
    found = descend(field_of(normal_velocity), x0, levels, depths, source=source, steps=200)
    assert torch.equal(found.frames[0], x0)
    for level, depth, frame in zip(levels, depths, found.frames[1:], strict=True):
        torch.testing.assert_close(frame, carried(x0, source, level, depth), rtol=0, atol=2e-3)


def test_back_and_forth_under_one_label_is_the_source():
    x0 = sources()
    for source in (0.0, 0.4):
        found = descend(field_of(normal_velocity), x0, [source] * 3, [0.3, 0.7, 1.0], source=source, steps=40)
        torch.testing.assert_close(found.frames, x0.expand(4, *x0.shape), rtol=0, atol=5e-3)
    moved = descend(field_of(mixing), x0, [0.0, 0.0], [0.4, 0.8], solver="rk4")
    torch.testing.assert_close(moved.frames, x0.expand(3, *x0.shape), rtol=0, atol=1e-4)


def test_the_deeper_the_more_a_source_becomes_its_target():
    x0 = MEANS[0] + DEVIATION * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = descend(field_of(normal_velocity), x0, [1.0] * 4, [0.1, 0.4, 0.7, 1.0])
    distance = (found.frames.mean((1, 2, 3, 4)) - MEANS[1]).abs()
    assert (distance.diff() < -0.02).all()
    assert distance[-1] < 0.05


def test_the_way_back_is_gone_once_unguided_under_the_sources_label():
    plain, guided = Recorded(normal_velocity), Recorded(normal_velocity)
    found = descend(field_of(plain, lambda wanted: guided), sources(), [0.5, 0.8, 1.0], [0.2, 0.6, 1.0], steps=10)
    assert len(plain.calls) == 10 * 2
    times = torch.stack([t for t, _, _ in plain.calls])
    assert (times == times[:, :1]).all()
    torch.testing.assert_close(times[::2, 0], 1 - torch.arange(10) / 10, rtol=0, atol=1e-6)
    assert all(torch.equal(cond.level, torch.tensor([1.0, 0.0]).expand(5, 2)) for _, _, cond in plain.calls)
    assert all(len(x) == 15 for _, x, _ in guided.calls)
    assert found.nfe == 10 * 2 + 3 * 10 * 2


def test_every_level_goes_its_own_way_forward():
    guided = Recorded(normal_velocity)
    descend(field_of(normal_velocity, lambda wanted: guided), sources(2), [0.5, 1.0], [0.2, 0.6], steps=4)
    times = torch.stack([t for t, _, _ in guided.calls[::2]])
    for column_, depth in ((0, 0.2), (1, 0.2), (2, 0.6), (3, 0.6)):
        expected = 1 - depth + depth * torch.arange(4) / 4
        torch.testing.assert_close(times[:, column_], expected, rtol=0, atol=1e-6)
    told = guided.calls[0][2].level[:, 1]
    assert told.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert torch.equal(guided.calls[0][2].source_image, sources(2).repeat(2, 1, 1, 1))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 14])
def test_chunks_never_change_a_depth_stair(batch_size):
    field = field_of(mixing, steered("score", GaussianSource()))
    whole, parts = (
        descend(field, sources(), [0.2, 0.5, 1.0], [0.2, 0.5, 1.0], batch_size=size) for size in (64, batch_size)
    )
    torch.testing.assert_close(parts.frames, whole.frames, rtol=0, atol=1e-4)
    assert parts[1:] == whole[1:] == ((30 + 3 * 30) * 2, 3 * 30 * 2)


def test_gradients_that_only_some_levels_take_are_counted_once_for_all_chunks():
    """Endpoint guidance is off at small t, which only deep levels pass; alone they take fewer gradients."""
    field, x0 = field_of(mixing, steered("endpoint", GaussianSource())), sources()
    options = {"steps": 50, "solver": "euler", "batch_size": len(x0)}  # a chunk is a level
    together = descend(field, x0, [0.5, 1.0], [0.5, 1.0], **options)
    alone = [descend(field, x0, [level], [level], **options).gradients for level in (0.5, 1.0)]
    assert alone == [50, 47]
    assert together.gradients == sum(alone)


def test_a_level_of_a_depth_stair_is_that_of_its_own():
    field, x0 = field_of(mixing, steered("score", GaussianSource())), sources()
    together = descend(field, x0, [0.5, 1.0], [0.5, 1.0])
    for k, depth in enumerate([0.5, 1.0]):
        alone = descend(field, x0, [depth], [depth])
        torch.testing.assert_close(alone.frames[1], together.frames[k + 1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_depth_stair_needs_noise_at_its_foot(name):
    label = two_classes(torch.ones(1))
    options = {"source": label[0], "depths": torch.ones(1), "told": label, "wanted": label}
    with pytest.raises(UserError, match=rf"translate\.method=depth: path {type(FROM_DATA[name]).__name__} starts from"):
        stairs.depth(field_of(mixing), FROM_DATA[name], sources(1), **options, steps=2, solver="euler", batch_size=1)


def test_a_progression_needs_a_source_at_its_foot():
    with pytest.raises(UserError, match=r"translate\.method=progression: path GaussianSource starts from noise"):
        climb(field_of(mixing), GaussianSource(), sources(1), noise=noise_of(1))


# Levels to conditions, and levels equally far apart

GRID = torch.linspace(0, 1, 11)


def test_conditions_invert_a_known_map():
    fine = torch.linspace(0, 1, 2001)
    levels = torch.tensor([0.05, 0.2, 0.5, 0.85, 1.0])
    found = condition_for(levels, fine, fine**2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, levels.sqrt(), rtol=0, atol=1e-3)
    torch.testing.assert_close(condition_for(levels, GRID, GRID), levels, rtol=0, atol=1e-5)


def test_conditions_between_grid_points_are_interpolated():
    reached = torch.tensor([0.0, 0.2, 0.6, 1.0])
    grid = torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = condition_for(torch.tensor([0.1, 0.4, 0.8]), grid, reached)
    torch.testing.assert_close(found, torch.tensor([0.125, 0.375, 0.75]), rtol=0, atol=1e-4)


def test_levels_beyond_what_the_guide_says_of_the_ends_still_rise():
    reached = 0.2 + 0.5 * GRID  # a guide that says 0.2 of the source's class and 0.7 of the target's
    found = condition_for(torch.tensor([0.125, 0.25, 0.3, 0.6, 0.65, 0.825, 1.0]), GRID, reached)
    torch.testing.assert_close(found, torch.tensor([0.05, 0.1, 0.2, 0.8, 0.9, 0.95, 1.0]), rtol=0, atol=1e-4)


def test_level_one_is_told_one_even_where_less_would_do():
    reached = (2 * GRID).clamp_max(1)
    assert condition_for(torch.tensor([0.9, 1.0]), GRID, reached).tolist() == [pytest.approx(0.45, abs=1e-4), 1]


def test_a_noisy_map_becomes_a_rising_one():
    noise = 0.08 * torch.randn(11, generator=torch.Generator().manual_seed(0))
    reached = (GRID + noise).clamp(0, 1)
    assert (reached.diff() < 0).any()
    levels = torch.linspace(0.02, 1, 50)
    found = condition_for(levels, GRID, reached)
    assert (found.diff() >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (found - levels).abs().max() < 0.2
    # Neighbours in the wrong order meet at their mean: 0.4 and 0.2 are 0.3 both.
    found = condition_for(torch.tensor([0.15, 0.45]), torch.linspace(0, 1, 5), torch.tensor([0.0, 0.4, 0.2, 0.6, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.125, 0.625]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("height", [0.0, 0.5, 1.0])
def test_a_level_on_a_plateau_is_a_number_inside_it(height):
    reached = torch.where(GRID < 0.25, 0.0, torch.where(GRID > 0.75, 1.0, height))
    levels = torch.linspace(0.01, 1, 100)
    found = condition_for(levels, GRID, reached)
    assert found.isfinite().all()
    assert (found.diff() >= 0).all()
    flat = condition_for(torch.tensor([height]), GRID, reached)
    assert 0 <= flat.item() <= 1
    if height == 0.5:
        assert 0.3 - 1e-4 <= flat.item() <= 0.7 + 1e-4


def test_a_network_that_ignores_what_it_is_told_gives_numbers():
    found = condition_for(torch.tensor([0.1, 0.6, 1.0]), GRID, torch.full((11,), 0.5))
    torch.testing.assert_close(found, torch.tensor([0.02, 0.92, 1.0]), rtol=0, atol=1e-4)


def test_equidistant_levels_of_an_even_way_are_even():
    found = equidistant_levels(GRID, torch.full((10,), 0.3), 5)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]))


def test_equidistant_levels_lie_where_the_way_is_long():
    """The way to level s is s^2, so the levels are square roots."""
    grid = torch.linspace(0, 1, 1001)
    found = equidistant_levels(grid, (grid**2).diff(), 8)
    torch.testing.assert_close(found, (torch.arange(1, 9) / 8).sqrt(), rtol=0, atol=1e-3)
    assert found[-1] == 1
    # What lies between two levels is the same for all, on any grid.
    uneven = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0])
    distances = torch.tensor([5.0, 1.0, 0.5, 3.5])
    travelled = torch.cat([torch.zeros(1), distances.cumsum(0)])
    levels = equidistant_levels(uneven, distances, 4)
    at = torch.searchsorted(uneven, levels).clamp(1, 4)
    way = torch.lerp(travelled[at - 1], travelled[at], (levels - uneven[at - 1]) / (uneven[at] - uneven[at - 1]))
    torch.testing.assert_close(way, torch.tensor([2.5, 5.0, 7.5, 10.0]), rtol=0, atol=1e-5)


def test_equidistant_levels_rise_over_a_stretch_where_nothing_moves():
    distances = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    found = equidistant_levels(GRID, distances, 8)
    assert (found.diff() > 0).all()
    assert 0 < found[0]
    assert found[-1] == 1


# Intervals of each sample's own


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"])
def test_intervals_of_samples_are_those_of_single_runs(solver):
    x, cond = sources(4), Condition(level=two_classes(LEVELS), source_image=sources(4).flip(0))
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

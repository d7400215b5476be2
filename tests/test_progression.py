"""The progression method: every frame is the end of an integration of its own, under the condition of its level."""

import numpy as np
import pytest
import torch
from toy_flow import (
    FROM_DATA,
    Recorded,
    column,
    drawn_to_level,
    flow_of,
    guide,
    mixing,
    noise_of,
    sources,
    steered,
    two_classes,
)

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.field.classifier_guided import ClassifierGuided
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.straight import Straight
from cellflux_bridge.transport.base import Flow, Result
from cellflux_bridge.transport.path import Path as PathTransport
from cellflux_bridge.transport.progression import Progression, condition_for, equidistant_levels

LEVELS = torch.tensor([0.2, 0.5, 0.9, 1.0])


def climb(
    flow: Flow, x0: torch.Tensor, levels=LEVELS, *, conditions=None, resampling=None, noise=None, **settings
) -> Result:
    """Sources carried to levels; the conditions are the levels, unless given."""
    settings = {"steps": 6, "solver": "midpoint", **settings}
    method = Progression(noise_resampling=resampling, **settings)
    return method.run(
        flow,
        x0,
        noise_of(len(x0)) if noise is None else noise,
        levels if conditions is None else conditions,
        levels,
        targets=levels,
        inverted=method.inverted(flow, x0)[0],
        steps=settings["steps"],
    )


@pytest.mark.parametrize("name", FROM_DATA)
def test_a_progression_reaches_the_condition_of_each_level(name):
    path, x0 = FROM_DATA[name], sources()
    found = climb(flow_of(path, drawn_to_level), x0, steps=40, solver="rk4")
    start = path.start(x0, noise_of())
    assert found.frames.shape == (5, 5, 3, 4, 4)
    assert found.frames.dtype == torch.float32
    assert torch.equal(found.frames[0], x0)
    decay = torch.tensor(-2.0 * (1 - path.t_start)).exp()
    for level, frame in zip(LEVELS, found.frames[1:], strict=True):
        torch.testing.assert_close(frame, level + (start - level) * decay, rtol=0, atol=1e-5)


def test_condition_and_target_label_are_different_things():
    """Calibration gives the network another level than the guide."""

    def guided(targets):
        return lambda t, x, cond: drawn_to_level(t, x, cond) + 0.6 * column(targets[:, 1])

    x0, conditions = sources(), torch.tensor([0.7, 0.1, 0.4, 0.0])
    flow = flow_of(Straight(), drawn_to_level, guided, batch_size=3)
    found = climb(flow, x0, conditions=conditions, steps=40, solver="rk4")
    for s, c, frame in zip(LEVELS, conditions, found.frames[1:], strict=True):
        goal = c + 0.3 * s
        torch.testing.assert_close(frame, goal + (x0 - goal) * torch.tensor(-2.0).exp(), rtol=0, atol=1e-5)


def test_all_levels_of_a_source_start_from_the_same_noise_and_see_its_clean_image():
    velocity, path, x0 = Recorded(drawn_to_level), FROM_DATA["brownian"], sources()
    climb(flow_of(path, velocity), x0, steps=1, solver="euler")
    ((t, x, cond),) = velocity.calls  # one batch
    assert torch.equal(x.view(4, *x0.shape), path.start(x0, noise_of()).expand(4, *x0.shape))
    assert torch.equal(cond.source_image.view(4, *x0.shape), x0.expand(4, *x0.shape))
    assert (t == path.t_start).all()
    assert torch.equal(cond.level, two_classes(LEVELS).repeat_interleave(5, 0))


@pytest.mark.parametrize("name", ["noised_source", "brownian"])
def test_without_new_noise_a_source_comes_back_under_its_own_condition(name):
    how = {"conditions": torch.tensor([0.3, 0.3, 0.8, 1.0]), "steps": 60, "solver": "rk4"}
    flow, x0 = flow_of(FROM_DATA[name], mixing, source=0.3), sources()
    found = climb(flow, x0, resampling=0.0, **how)
    torch.testing.assert_close(found.frames[1], x0, rtol=0, atol=1e-5)
    assert (found.frames[3] - x0).abs().max() > 0.05
    random = climb(flow, x0, **how)
    assert (random.frames[1] - x0).abs().max() > 0.05


def test_an_inversion_costs_one_way_whatever_the_batches():
    method = Progression(noise_resampling=0.5, steps=7)
    whole, forwards = method.inverted(flow_of(FROM_DATA["noised_source"], mixing), sources())
    parts, as_many = method.inverted(flow_of(FROM_DATA["noised_source"], mixing, batch_size=2), sources())
    assert forwards == as_many == 14
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_inverted_noise_turns_into_random_noise():
    """Of dx/dt = -2 (x - c) back from x0 under c = 0: x(0) = x0 exp(2); a turn of a quarter times the share."""
    x0, shares = sources(), torch.tensor([0.0, 0.5, 1.0])
    velocity = Recorded(drawn_to_level)
    flow = flow_of(FROM_DATA["noised_source"], velocity)
    climb(flow, x0, shares, resampling=1.0, steps=40, solver="rk4")
    start = next(x for _, x, _ in velocity.calls if len(x) == 15).view(3, *x0.shape)
    own, random = x0 * (torch.tensor(2.0).exp() - 1), 0.5 * noise_of()
    half = torch.tensor(0.5).sqrt()
    for found, expected in zip(start, (own, half * (own + random), random), strict=True):
        torch.testing.assert_close(found, x0 + expected, rtol=0, atol=1e-4)


def test_sources_may_have_conditions_of_their_own():
    x0, each = sources(), torch.linspace(0, 1, 20).view(4, 5)
    flow = flow_of(FROM_DATA["noised_source"], mixing)
    together = climb(flow, x0, conditions=each, resampling=1.0)
    for b in range(5):
        own = {"conditions": each[:, b], "noise": noise_of()[b : b + 1]}
        alone = climb(flow, x0[b : b + 1], resampling=1.0, **own)
        torch.testing.assert_close(together.frames[:, b], alone.frames[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("resampling", [None, 0.8], ids=["random", "inverted"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 19, 20])
def test_chunks_never_change_a_progression(batch_size, resampling):
    path = FROM_DATA["noised_source"]
    whole, parts = (
        climb(flow_of(path, mixing, steered("bridge", path), batch_size=size), sources(), resampling=resampling)
        for size in (64, batch_size)
    )
    torch.testing.assert_close(parts.frames, whole.frames, rtol=0, atol=1e-5)
    assert parts[1:] == whole[1:]


def test_no_more_rows_than_the_batch_size_are_seen_at_once():
    velocity = Recorded(mixing)
    climb(flow_of(Straight(), velocity, batch_size=7), sources())
    assert [len(x) for _, x, _ in velocity.calls[::12]] == [7, 7, 6]


@pytest.mark.parametrize("form", ["endpoint", "bridge"])
def test_a_frame_is_that_of_its_level_alone(form):
    path, x0 = FROM_DATA["noised_source"], sources()
    flow = flow_of(path, mixing, steered(form, path))
    together = climb(flow, x0)
    for k in range(len(LEVELS)):
        alone = climb(flow, x0, LEVELS[k : k + 1])
        torch.testing.assert_close(alone.frames[1], together.frames[k + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(together.frames[1], together.frames[4], atol=1e-2)


def test_a_source_alone_is_the_same_as_in_a_batch():
    path, x0 = FROM_DATA["noised_source"], sources()
    flow = flow_of(path, mixing, steered("endpoint", path))
    together, alone = climb(flow, x0), climb(flow, x0[3:4], noise=noise_of()[3:4])
    torch.testing.assert_close(alone.frames, together.frames[:, 3:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_progression_costs_all_its_levels(solver, calls, scale):
    path = FROM_DATA["noised_source"]
    inside = ClassifierFree(mixing, scale)
    plain = climb(flow_of(path, inside), sources(), solver=solver)
    assert (plain.nfe, plain.gradients) == (4 * 6 * calls * (1 if scale == 1 else 2), 0)
    guided = flow_of(path, inside, steered("sharpen", path, inside), batch_size=3)
    found = climb(guided, sources(), solver=solver)
    assert (found.nfe, found.gradients) == (plain.nfe, 4 * 6 * calls)


def test_a_solver_that_chooses_its_steps_costs_what_its_chunks_cost_together():
    velocity = Recorded(lambda t, x, cond: 40 * column(cond.level[:, 1]) * (column(cond.level[:, 1]) - x))
    found = climb(flow_of(Straight(), velocity, batch_size=5), sources(), solver="dopri5")  # a chunk is a level
    calls = [len(x) for _, x, _ in velocity.calls]
    assert set(calls) == {5}
    assert found.nfe == len(calls)


def test_the_source_image_is_left_as_it_is():
    x0 = sources()
    before = x0.clone()
    climb(flow_of(FROM_DATA["noised_source"], drawn_to_level), x0)
    assert torch.equal(x0, before)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"])
@pytest.mark.parametrize("form", ["bridge", "sharpen", "endpoint"])
@pytest.mark.parametrize("method", ["path", "progression", "inversion"])
def test_network_and_guide_of_a_brownian_path_see_the_times_of_their_training_only(method, form, solver):
    path, velocity, guided = FROM_DATA["brownian"], Recorded(drawn_to_level), Recorded(guide)

    def steer(targets):
        return ClassifierGuided(velocity, [lambda x, *other: guided(x, *(other or (None, None)))], path, targets,
                                form=form, weight=0.5, start=0.01)  # fmt: skip

    how = {"steps": 12, "solver": solver}
    transport = (
        PathTransport(**how, frames=3)
        if method == "path"
        else Progression(**how, noise_resampling=0.5 if method == "inversion" else None)
    )
    flow = flow_of(path, velocity, steer)
    transport.require(flow, given={})
    found = transport.carry(flow, sources(), noise=noise_of(), levels=torch.tensor([0.5, 1.0]), meter=None)
    times = torch.cat([t for t, _, _ in velocity.calls] + [t for _, t, _ in guided.calls if t is not None])
    assert len(guided.calls) > 0
    assert path.t_start == pytest.approx(times.min().item())
    assert times.max().item() <= 1 - path.margin + 1e-7
    assert found.frames.isfinite().all()
    assert found.frames.abs().max() < 50


def test_a_progression_needs_a_source_at_its_foot():
    with pytest.raises(UserError, match=r"translate\.method=progression: path GaussianSource starts from noise"):
        Progression().require(flow_of(GaussianSource(), mixing), given={})


@pytest.mark.parametrize("path", [*FROM_DATA.values(), NoisedSource(scale=0.5, probability=0.5, noisy_start=False)])
@pytest.mark.parametrize("resampling", [None, 0.0, 0.5])
def test_noise_is_resampled_only_where_a_path_starts_with_noise(path, resampling):
    method, flow = Progression(noise_resampling=resampling), flow_of(path, mixing)
    if resampling is None or path is FROM_DATA["noised_source"] or path is FROM_DATA["brownian"]:
        method.require(flow, given={})
    else:
        with pytest.raises(UserError, match=rf"translate\.noise_resampling: path {type(path).__name__} starts without"):
            method.require(flow, given={})


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


def test_level_one_has_condition_one_even_where_less_would_do():
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


def test_a_network_that_ignores_its_condition_gives_numbers():
    found = condition_for(torch.tensor([0.1, 0.6, 1.0]), GRID, torch.full((11,), 0.5))
    torch.testing.assert_close(found, torch.tensor([0.02, 0.92, 1.0]), rtol=0, atol=1e-4)


def test_equidistant_levels_of_an_even_way_are_even():
    np.testing.assert_allclose(
        equidistant_levels(GRID.double().numpy(), 3 * GRID.double().numpy(), 5), [0.2, 0.4, 0.6, 0.8, 1.0]
    )


def test_equidistant_levels_lie_where_the_way_is_long():
    """The way to level s is s^2, so the levels are square roots."""
    grid = np.linspace(0, 1, 1001)
    found = equidistant_levels(grid, grid**2, 8)
    np.testing.assert_allclose(found, np.sqrt(np.arange(1, 9) / 8), atol=1e-3)
    assert found[-1] == 1
    # What lies between two levels is the same for all, on any grid.
    uneven, travelled = [0.0, 0.1, 0.5, 0.6, 1.0], [0.0, 5.0, 6.0, 6.5, 10.0]
    levels = equidistant_levels(np.array(uneven), np.array(travelled), 4)
    np.testing.assert_allclose(np.interp(levels, uneven, travelled), [2.5, 5.0, 7.5, 10.0], atol=1e-5)


def test_equidistant_levels_rise_over_a_stretch_where_nothing_moves():
    travelled = np.cumsum([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    found = equidistant_levels(GRID.double().numpy(), travelled, 8)
    assert (np.diff(found, prepend=0) > 0).all()
    assert found[-1] == 1
    assert found[1] == pytest.approx(0.1)  # the way 1 of 4 is made at .1 and stays so until .4

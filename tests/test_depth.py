"""The depth method: back to a depth under the source's label, forward under the level of each frame."""

import pytest
import torch
from toy_flow import FROM_DATA, Recorded, column, flow_of, mixing, sources, steered

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.transport.base import Result
from cellflux_bridge.transport.depth import Depth

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


def descend(
    velocity, x0: torch.Tensor, levels, depths, *, guided=None, source: float = 0.0, batch_size: int = 64, **settings
) -> Result:
    """Sources carried back to depths, rising or equal, and forward to levels."""
    flow = flow_of(GaussianSource(), velocity, guided, batch_size=batch_size, source=source)
    method = Depth(depths=list(depths), conditions=list(levels), **{"steps": 30, **settings})
    return method.carry(flow, x0, noise=None, levels=torch.as_tensor(levels), meter=None)


@pytest.mark.parametrize("source", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    ("levels", "depths"),
    [
        ([1.0, 1.0, 1.0], [0.2, 0.55, 1.0]),  # rising depths, one level: Cellflow's sequence
        ([0.3, 0.6, 1.0], [1.0, 1.0, 1.0]),  # full depth, rising levels: invert and regenerate
        ([0.25, 0.5, 1.0], [0.25, 0.5, 0.5]),  # both rise
    ],
)
def test_a_depth_sequence_of_normal_laws_follows_its_closed_form(levels, depths, source):
    x0 = sources()
    found = descend(normal_velocity, x0, levels, depths, source=source, steps=200)
    assert torch.equal(found.frames[0], x0)
    for level, depth, frame in zip(levels, depths, found.frames[1:], strict=True):
        torch.testing.assert_close(frame, carried(x0, source, level, depth), rtol=0, atol=2e-3)


def test_back_and_forth_under_one_label_is_the_source():
    x0 = sources()
    for source in (0.0, 0.4):
        found = descend(normal_velocity, x0, [source] * 3, [0.3, 0.7, 1.0], source=source, steps=40)
        torch.testing.assert_close(found.frames, x0.expand(4, *x0.shape), rtol=0, atol=5e-3)
    moved = descend(mixing, x0, [0.0, 0.0], [0.4, 0.8], solver="rk4")
    torch.testing.assert_close(moved.frames, x0.expand(3, *x0.shape), rtol=0, atol=1e-4)


def test_the_deeper_the_more_a_source_becomes_its_target():
    x0 = MEANS[0] + DEVIATION * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = descend(normal_velocity, x0, [1.0] * 4, [0.1, 0.4, 0.7, 1.0])
    distance = (found.frames.mean((1, 2, 3, 4)) - MEANS[1]).abs()
    assert (distance.diff() < -0.02).all()
    assert distance[-1] < 0.05


def test_the_way_back_is_gone_once_unguided_under_the_sources_label():
    plain, guided = Recorded(normal_velocity), Recorded(normal_velocity)
    found = descend(plain, sources(), [0.5, 0.8, 1.0], [0.2, 0.6, 1.0], guided=lambda targets: guided, steps=10)
    assert len(plain.calls) == 10 * 2
    times = torch.stack([t for t, _, _ in plain.calls])
    assert (times == times[:, :1]).all()
    torch.testing.assert_close(times[::2, 0], 1 - torch.arange(10) / 10, rtol=0, atol=1e-6)
    assert all(torch.equal(cond.level, torch.tensor([1.0, 0.0]).expand(5, 2)) for _, _, cond in plain.calls)
    assert all(len(x) == 15 for _, x, _ in guided.calls)
    assert found.nfe == 10 * 2 + 3 * 10 * 2


def test_every_level_goes_its_own_way_forward():
    guided = Recorded(normal_velocity)
    descend(normal_velocity, sources(2), [0.5, 1.0], [0.2, 0.6], guided=lambda targets: guided, steps=4)
    times = torch.stack([t for t, _, _ in guided.calls[::2]])
    for column_, depth in ((0, 0.2), (1, 0.2), (2, 0.6), (3, 0.6)):
        expected = 1 - depth + depth * torch.arange(4) / 4
        torch.testing.assert_close(times[:, column_], expected, rtol=0, atol=1e-6)
    levels = guided.calls[0][2].level[:, 1]
    assert levels.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert torch.equal(guided.calls[0][2].source_image, sources(2).repeat(2, 1, 1, 1))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 14])
def test_chunks_never_change_a_depth_sequence(batch_size):
    guided = steered("score", GaussianSource())
    whole, parts = (
        descend(mixing, sources(), [0.2, 0.5, 1.0], [0.2, 0.5, 1.0], batch_size=size, guided=guided)
        for size in (64, batch_size)
    )
    torch.testing.assert_close(parts.frames, whole.frames, rtol=0, atol=1e-4)
    assert parts[1:3] == whole[1:3] == ((30 + 3 * 30) * 2, 3 * 30 * 2)


def test_gradients_that_only_some_levels_take_are_counted_once_for_all_chunks():
    """Endpoint guidance is off at small t, which only deep levels pass; alone they take fewer gradients."""
    guided, x0 = steered("endpoint", GaussianSource()), sources()
    options = {"steps": 50, "solver": "euler", "batch_size": len(x0)}  # a chunk is a level
    together = descend(mixing, x0, [0.5, 1.0], [0.5, 1.0], **options, guided=guided)
    alone = [descend(mixing, x0, [level], [level], **options, guided=guided).gradients for level in (0.5, 1.0)]
    assert alone == [50, 47]
    assert together.gradients == sum(alone)


def test_a_level_of_a_depth_sequence_is_that_of_its_own():
    guided, x0 = steered("score", GaussianSource()), sources()
    together = descend(mixing, x0, [0.5, 1.0], [0.5, 1.0], guided=guided)
    for k, depth in enumerate([0.5, 1.0]):
        alone = descend(mixing, x0, [depth], [depth], guided=guided)
        torch.testing.assert_close(alone.frames[1], together.frames[k + 1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", FROM_DATA)
def test_the_depth_method_needs_noise_at_its_foot(name):
    with pytest.raises(UserError, match=rf"translate\.method=depth: path {type(FROM_DATA[name]).__name__} starts from"):
        Depth().require(flow_of(FROM_DATA[name], mixing), given={})

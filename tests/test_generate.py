"""The generate method: from noise alone to the target's law."""

import pytest
import torch
from test_depth import DEVIATION, MEANS, normal_velocity
from toy_flow import FROM_DATA, flow_of, mixing, noise_of, sources, steered

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.path.gaussian_source import GaussianSource
from cellflux_bridge.transport.generate import Generate

ONE = torch.ones(1)


def generated(velocity, x0, noise, *, guided=None, batch_size: int = 64, **settings):
    flow = flow_of(GaussianSource(), velocity, guided, batch_size=batch_size)
    return Generate(**settings).carry(flow, x0, noise=noise, levels=ONE, meter=None)


def test_noise_becomes_the_targets_normal_law_in_closed_form():
    x0, noise = sources(), noise_of()
    found = generated(normal_velocity, x0, noise, steps=200)
    assert torch.equal(found.frames[0], x0)
    torch.testing.assert_close(found.frames[1], MEANS[1] + DEVIATION * noise, rtol=0, atol=2e-3)
    assert found.nfe == 400


def test_the_source_gives_nothing_but_its_noise():
    noise = noise_of()
    one, other = (generated(normal_velocity, x0, noise, steps=4) for x0 in (sources(), -sources()))
    assert torch.equal(one.frames[1], other.frames[1])


def test_a_batch_does_not_matter_and_guidance_is_the_classifiers():
    x0, noise = sources(), noise_of()
    whole, parts = (generated(mixing, x0, noise, steps=3, batch_size=size) for size in (64, 2))
    torch.testing.assert_close(whole.frames, parts.frames)
    guided = generated(mixing, x0, noise, steps=3, guided=steered("endpoint", GaussianSource()))
    assert guided.gradients == 5  # of six forwards; it is off at t = 0
    assert not torch.allclose(guided.frames[1], whole.frames[1])


def test_a_flow_from_source_images_is_refused():
    with pytest.raises(UserError, match=r"method=generate: path NoisedSource starts from source images"):
        Generate().require(flow_of(FROM_DATA["noised_source"], mixing), given={})

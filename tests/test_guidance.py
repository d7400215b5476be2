"""Classifier-free guidance: its formula, and what it costs."""

import pytest
import torch

from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.classifier_free import ClassifierFree


class Recorded:
    """A velocity with a known conditional and null answer that records the batch sizes it was called with."""

    def __init__(self):
        self.sizes = []

    def __call__(self, t, x, cond):
        self.sizes.append(len(x))
        dropped = torch.zeros(len(x), dtype=torch.bool) if cond.dropped is None else cond.dropped
        shift = torch.where(dropped, 0.0, 1.0 + cond.target_class)
        return (
            t.view(-1, 1, 1, 1) * x + shift.view(-1, 1, 1, 1) + (0 if cond.source_image is None else cond.source_image)
        )


def inputs(num: int = 4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 3, 4, 4, generator=generator)
    return torch.rand(num, generator=generator), x, Condition(target_class=torch.arange(num) % 3)


def test_scale_one_is_the_velocity_itself_in_one_forward():
    velocity, (t, x, cond) = Recorded(), inputs()
    guided = ClassifierFree(velocity, 1.0)
    assert torch.equal(guided(t, x, cond).velocity, Recorded()(t, x, cond))
    assert velocity.sizes == [4]
    assert guided(t, x, cond).forwards == 1


def test_scale_zero_is_the_null_in_one_forward():
    velocity, (t, x, cond) = Recorded(), inputs()
    guided = ClassifierFree(velocity, 0)
    assert torch.equal(guided(t, x, cond).velocity, Recorded()(t, x, cond.null()))
    assert velocity.sizes == [4]
    assert guided(t, x, cond).forwards == 1


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_other_scales_extrapolate_from_the_null(scale):
    velocity, (t, x, cond) = Recorded(), inputs()
    guided = ClassifierFree(velocity, scale)
    null, conditional = Recorded()(t, x, cond.null()), Recorded()(t, x, cond)
    torch.testing.assert_close(guided(t, x, cond).velocity, null + scale * (conditional - null))
    assert velocity.sizes == [8]
    assert guided(t, x, cond)[1:] == (2, 0)


def test_the_source_image_stays_in_the_null():
    t, x, cond = inputs()
    cond = Condition(target_class=cond.target_class, source_image=10 * torch.ones_like(x))
    guided = ClassifierFree(Recorded(), 3.0)(t, x, cond).velocity
    torch.testing.assert_close(guided, t.view(-1, 1, 1, 1) * x + 10 + 3 * (1 + cond.target_class).view(-1, 1, 1, 1))


def test_a_sample_dropped_already_is_not_guided():
    t, x, cond = inputs()
    cond = cond.drop(torch.tensor([True, False, False, False]))
    guided = ClassifierFree(Recorded(), 3.0)(t, x, cond).velocity
    torch.testing.assert_close(guided[0], t[0] * x[0])


def test_costs_multiply_when_nested():
    inner, args = ClassifierFree(Recorded(), 2.0), inputs()
    assert ClassifierFree(inner, 3.0)(*args).forwards == 4
    assert ClassifierFree(inner, 1.0)(*args).forwards == 2


def test_nested_guidance_multiplies_its_scales():
    t, x, cond = inputs()
    nested = ClassifierFree(ClassifierFree(Recorded(), 2.0), 3.0)
    torch.testing.assert_close(nested(t, x, cond).velocity, ClassifierFree(Recorded(), 6.0)(t, x, cond).velocity)

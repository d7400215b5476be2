"""What a call of a velocity gives: the velocity, and what it cost."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from cellflux_bridge.condition.base import Condition


class Evaluation(NamedTuple):
    """A velocity (B, C, H, W); network forwards and classifier gradients that it took for each image."""

    velocity: torch.Tensor
    forwards: int = 1
    gradients: int = 0


def evaluate(velocity: Callable, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> Evaluation:
    """Call a field, which gives an `Evaluation`, or a network, which gives a velocity and costs one forward."""
    found = velocity(t, x, cond)
    return found if isinstance(found, Evaluation) else Evaluation(found)

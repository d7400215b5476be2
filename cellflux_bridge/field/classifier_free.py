"""Classifier-free guidance as a wrapper around any velocity."""

from collections.abc import Callable

import torch

from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.base import Evaluation, evaluate


class ClassifierFree:
    """v = v_null + scale (v_cond - v_null) (Ho & Salimans 2022); scale 1 is no guidance and costs one forward.

    CellFlux's strength s is scale - 1. Any other scale than 0 and 1 costs two forwards a call, made as one batch.
    """

    def __init__(self, velocity: Callable, scale: float):
        self._velocity, self._scale = velocity, scale

    def __call__(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> Evaluation:
        if self._scale in (0, 1):
            return evaluate(self._velocity, t, x, cond if self._scale else cond.null())
        twice = Condition.cat([cond, cond.null()])
        both, forwards, gradients = evaluate(self._velocity, t.repeat(2), x.repeat(2, 1, 1, 1), twice)
        conditional, unconditional = both.chunk(2)
        return Evaluation(unconditional + self._scale * (conditional - unconditional), 2 * forwards, 2 * gradients)

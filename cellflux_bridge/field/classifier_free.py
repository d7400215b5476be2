"""Classifier-free guidance as a wrapper around any velocity."""

import torch

from cellflux_bridge.condition.base import Condition


class ClassifierFree:
    """v = v_null + scale (v_cond - v_null) (Ho & Salimans 2022); scale 1 is no guidance and costs one forward.

    CellFlux's strength s is scale - 1. Any other scale than 0 and 1 costs two forwards a call, made as one batch.
    """

    def __init__(self, velocity, scale: float):
        self._velocity, self._scale = velocity, scale
        self.forwards_per_call = getattr(velocity, "forwards_per_call", 1) * (1 if scale in (0, 1) else 2)

    def __call__(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        if self._scale == 1:
            return self._velocity(t, x, cond)
        if self._scale == 0:
            return self._velocity(t, x, cond.null())
        both = self._velocity(t.repeat(2), x.repeat(2, 1, 1, 1), Condition.cat([cond, cond.null()]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self._scale * (conditional - unconditional)

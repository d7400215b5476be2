"""Exponential moving average of weights, with warm-up."""

from copy import deepcopy
from itertools import chain

import torch
from torch import nn


class EMA:
    """A copy `module` of a model, which update n >= 1 moves towards it by 1 - min(decay, (1 + n) / (10 + n)).

    The warm-up keeps the random initial weights from lingering in short runs; update 0 takes the model's. Buffers are
    averaged alike, so that the statistics of a batch normalisation are not those of the last few batches; counters are
    copied. Unlike torch's `AveragedModel` it counts updates in Python: a counter that is read back from a GPU makes
    every update wait for it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.num_updates, self._decay = deepcopy(model), 0, decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = self.num_updates
        pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)), strict=True))
        moved = [pair for pair in pairs if n and pair[0].is_floating_point()]
        if moved:
            share = 1 - min(self._decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(*map(list, zip(*moved, strict=True)), share)
        for own, other in pairs:
            if not (n and own.is_floating_point()):
                own.copy_(other)
        self.num_updates += 1

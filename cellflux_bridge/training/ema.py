"""Exponential moving average of weights, with warm-up."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model whose `update_parameters` moves it by 1 - min(decay, (1 + n) / (10 + n)) at update n.

    The warm-up keeps the random initial weights from lingering in short runs. Buffers are averaged alike, so that the
    statistics of a batch normalisation are not those of the last few batches; counters are copied.
    """

    @torch.no_grad()
    def update(averages, values, num_averaged) -> None:
        n = float(num_averaged)
        if averages[0].is_floating_point():  # tensors come in groups of one type
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)

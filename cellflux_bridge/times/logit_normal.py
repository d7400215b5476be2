"""Some part of the way more often than its ends."""

from typing import Annotated

import torch
from pydantic import Field

from cellflux_bridge.times.base import Times

Mean = Annotated[float, Field(ge=-10, le=10)]
Spread = Annotated[float, Field(gt=0, le=10)]


class LogitNormal(Times):
    """log(t / (1 - t)) ~ N(mean, std^2) (Esser et al. 2024, arXiv 2403.03206, eq. 19). Half of all times lie below
    1 / (1 + exp(-mean)): a negative mean trains more where little of the target is seen yet."""

    def __init__(self, *, mean: Mean = 0.0, std: Spread = 1.0):
        self._mean, self._std = mean, std

    def quantiles(self, shares):
        normal = torch.special.ndtri(shares.double())  # infinite at 0 and 1, whose times are 0 and 1
        return torch.sigmoid(self._mean + self._std * normal).to(shares.dtype)

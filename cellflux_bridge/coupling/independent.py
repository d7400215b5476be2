"""Targets drawn without looking at the source."""

import torch

from cellflux_bridge.coupling.base import Coupling


class Independent(Coupling):
    """A random permutation inside each block."""

    def permutation(self, x0, x1, *, generator):
        return torch.randperm(len(x0), generator=generator)

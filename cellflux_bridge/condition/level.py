"""The level that a sample is to reach: a soft label."""

import torch
from torch import nn

from cellflux_bridge.condition.base import Part


class Level(Part):
    """The target's soft label (B, num_classes), whose entries sum to 1, as a vector.

    Level c between classes A and B is (1 - c, c); any mixture of more classes is a level, too. It enters as it is, so
    that levels between trained ones interpolate: a periodic function of it would take values between the trained ends
    that the network has never seen.
    """

    name, field, slot, of_target = "level", "target_level", "target", True

    def embedding(self, width: int) -> nn.Module:
        return _LevelEmbedding(nn.Linear(self.num_classes, width), nn.SiLU(), nn.Linear(width, width))


class _LevelEmbedding(nn.Sequential):
    def forward(self, level: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * level.float() - 1)

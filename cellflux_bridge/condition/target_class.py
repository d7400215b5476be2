"""The class that a sample is to become."""

from collections.abc import Mapping

import torch
from torch import nn

from cellflux_bridge.condition.base import Part


class TargetClass(Part):
    """The target class (B,) int64 as a learned vector."""

    name, slot = "target_class", "target"

    def read(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fields["target_class"]

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(self.num_classes, width)

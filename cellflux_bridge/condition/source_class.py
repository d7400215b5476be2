"""The class that a sample comes from."""

from collections.abc import Mapping

import torch
from torch import nn

from cellflux_bridge.condition.base import Part


class SourceClass(Part):
    """The source class (B,) int64 as a learned vector."""

    name, slot = "source_class", "source"

    def read(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fields["source_class"]

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(self.num_classes, width)

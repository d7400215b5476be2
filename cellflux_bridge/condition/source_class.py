"""The class that a sample comes from."""

from torch import nn

from cellflux_bridge.condition.base import Part


class SourceClass(Part):
    """The source class (B,) int64 as a learned vector."""

    name, slot = "source_class", "source"

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(self.num_classes, width)

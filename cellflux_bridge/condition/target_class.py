"""The class that a sample is to become."""

from torch import nn

from cellflux_bridge.condition.base import Part


class TargetClass(Part):
    """The target class (B,) int64 as a learned vector."""

    name, slot, of_target = "target_class", "target", True

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(self.num_classes, width)

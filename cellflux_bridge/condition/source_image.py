"""The clean source image."""

from torch import nn

from cellflux_bridge.condition.base import Part


class SourceImage(Part):
    """The clean source x0 (B, C, H, W), beside the state; it stays where the condition is dropped.

    It needs a path with noise on every sample: `flow.network.build_flow` says why.
    """

    name, field, form, stays = "source_image", "x0", "map", True

    def embedding(self, width: int) -> nn.Module:
        return nn.Identity()

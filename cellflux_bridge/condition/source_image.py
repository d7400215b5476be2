"""The clean source image."""

from collections.abc import Mapping

import torch
from torch import nn

from cellflux_bridge.condition.base import Part


class SourceImage(Part):
    """The clean source x0 (B, C, H, W), beside the state; it stays where the condition is dropped.

    It needs a path with noise on every sample: `flow.network.build_flow` says why.
    """

    name, form, stays = "source_image", "map", True

    def read(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return fields["x0"]

    def embedding(self, width: int) -> nn.Module:
        return nn.Identity()

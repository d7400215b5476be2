"""The plate or experiment that a sample belongs to."""

import torch
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Part


class Batch(Part):
    """The batch (B,) int64 as a learned vector; absent where it is not known.

    A flow from noise needs it to draw a cell as its plate looks; a flow from control cells has it from the source.
    UserError for data without batches.
    """

    name, optional = "batch", True

    def __init__(self, names, channels):
        super().__init__(names, channels)
        if not names.batches:
            raise UserError(
                "condition.parts: batch needs data that names batches (a manifest's column batch, or data.batches)"
            )

    def read(self, fields):
        return fields["batch"].clamp(min=0)

    def is_present(self, fields) -> torch.Tensor:
        return fields["batch"] >= 0

    def embedding(self, width):
        return nn.Embedding(len(self.names.batches), width)

"""The plate or experiment that a sample belongs to."""

import torch
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Part


class Batch(Part):
    """The batch (B,) int64 as a learned vector; absent where it is not known, and zeros where no training saw it.

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
        return _Batches(len(self.names.batches), width)


class _Batches(nn.Embedding):
    """Learned vectors; zeros for batches that no training update had."""

    def __init__(self, num: int, width: int):
        super().__init__(num, width)
        self.register_buffer("trained", torch.zeros(num, dtype=torch.bool))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.trained[batch] = True
        return super().forward(batch) * self.trained[batch, None]

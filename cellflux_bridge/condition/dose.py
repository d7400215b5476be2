"""How much of a treatment a sample gets."""

import torch
from torch import nn

from cellflux_bridge.condition.base import Part, begin_at_one


class Dose(Part):
    """The logarithm (base 10) of the target's dose (B,) as a vector; absent where there is none, as of a control."""

    name, optional, of_target = "dose", True, True

    def read(self, fields):
        return torch.where(fields["dose"] > 0, fields["dose"], 1).log10()[:, None]

    def is_present(self, fields) -> torch.Tensor:
        return fields["dose"] > 0

    def embedding(self, width):
        return nn.Sequential(nn.Linear(1, width), nn.SiLU(), begin_at_one(nn.Linear(width, width)))

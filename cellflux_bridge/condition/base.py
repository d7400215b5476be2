"""What a velocity network is told beside time and state, and how it is embedded."""

from dataclasses import dataclass, fields, replace

import torch
from torch import nn


@dataclass(frozen=True)
class ConditionSpec:
    """What a network's condition consists of; part of its architecture.

    `target` is "class" or "level" (a soft label, see `Condition`); the source class and the clean source image are
    optional.
    """

    num_classes: int
    target: str = "class"
    source_class: bool = True
    source_image: bool = False


@dataclass(frozen=True)
class Condition:
    """The condition of B samples; every field is (B, ...) or None.

    target_class, source_class int64; level (B, num_classes) float32, a soft label whose entries sum to 1: level c
    between classes A and B is (1 - c, c), and any mixture of more classes is one too; source_image (B, C, H, W) float32
    in [-1, 1], the clean x0; `dropped` bool marks samples whose class, level and source class are replaced by the
    learned null.
    """

    target_class: torch.Tensor | None = None
    level: torch.Tensor | None = None
    source_class: torch.Tensor | None = None
    source_image: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def _map(self, function) -> "Condition":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{name: None if v is None else function(v) for name, v in values.items()})

    def __len__(self) -> int:
        return len(self.target_class if self.target_class is not None else self.level)

    def to(self, device: torch.device) -> "Condition":
        return self._map(lambda value: value.to(device))

    def drop(self, mask: torch.Tensor) -> "Condition":
        """The same condition with the samples of a (B,) bool mask dropped to the null."""
        return replace(self, dropped=mask if self.dropped is None else self.dropped | mask)

    def null(self) -> "Condition":
        """The unconditional condition of the same samples; the clean source image stays."""
        anchor = self.target_class if self.target_class is not None else self.level
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=anchor.device))

    @staticmethod
    def cat(parts: "list[Condition]") -> "Condition":
        """Conditions joined along the batch; fields must be present in all parts or in none."""
        joined = {}
        for field in fields(Condition):
            values = [getattr(part, field.name) for part in parts]
            if field.name == "dropped" and any(v is not None for v in values):
                device = next(v for v in values if v is not None).device
                values = [
                    torch.zeros(len(p), dtype=torch.bool, device=device) if v is None else v
                    for p, v in zip(parts, values, strict=True)
                ]
            joined[field.name] = None if values[0] is None else torch.cat(values)
        return Condition(**joined)


def sinusoidal(values: torch.Tensor, dim: int, *, max_period: float = 10_000.0) -> torch.Tensor:
    """Sinusoidal embedding (B, dim) of numbers in [0, 1], scaled by 1000 as diffusion time steps are."""
    half = dim // 2
    frequencies = max_period ** (-torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = 1000.0 * values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ConditionEmbedding(nn.Module):
    """A condition as one vector (B, dim), with a learned null for dropped samples."""

    def __init__(self, spec: ConditionSpec, dim: int):
        super().__init__()
        self._spec = spec
        if spec.target == "class":
            self.target = nn.Embedding(spec.num_classes, dim)
        else:
            # A level enters as it is, so that levels between trained ones interpolate: of a periodic function of it, a
            # network trained near the ends alone has never seen the values between.
            self.target = nn.Sequential(nn.Linear(spec.num_classes, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.source = nn.Embedding(spec.num_classes, dim) if spec.source_class else None
        self.null = nn.Parameter(torch.zeros(dim))

    def forward(self, cond: Condition) -> torch.Tensor:
        if self._spec.target == "class":
            vector = self.target(cond.target_class)
        else:
            vector = self.target(2 * cond.level.float() - 1)
        if self.source is not None:
            vector = vector + self.source(cond.source_class)
        if cond.dropped is not None:
            vector = torch.where(cond.dropped[:, None], self.null, vector)
        return vector

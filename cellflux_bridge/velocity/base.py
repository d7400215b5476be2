"""What velocity networks share: their interface, the bounds of their arguments, and what their output means."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionEmbedding, ConditionSpec
from cellflux_bridge.config.schema import Count, FewLevels

# Bounds of the networks' arguments, which become the schema of their YAML.
Width = Annotated[int, Field(ge=4, le=65_536, multiple_of=4)]
Multipliers = Annotated[tuple[Count, ...], FewLevels]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Prediction = Literal["velocity", "endpoint", "target"]


class Velocity(nn.Module):
    """A network v(t, x, cond). It is constructed with the number of a state's channels, a `ConditionSpec` and its
    settings.

    `spec` says what the network is conditioned on. Both sides of a state must be divisible by `stride`. A constructor
    reads no tensor's values: before a run is loaded, its network is built without memory (torch's meta device).
    """

    spec: ConditionSpec
    stride: int
    _predict: Prediction = "velocity"

    def forward(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Velocity (B, C, H, W) at times t (B,) of states x (B, C, H, W)."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Put what parts of the condition read, and do not learn, into the network; before a training."""
        for module in self.modules():
            if isinstance(module, ConditionEmbedding):
                module.prepare()

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """The weight (B,) in training of squared errors of velocities at times t (B,)."""
        return late_weight(t) if self._predict == "endpoint" else torch.ones_like(t)


def require_levels(attention: Sequence[int], multipliers: Sequence[int]) -> None:
    """UserError where `attention` names a level that a network does not have."""
    if any(not 0 <= level < len(multipliers) for level in attention):
        raise UserError(f"velocity.attention: {tuple(attention)} names a level outside 0..{len(multipliers) - 1}")


def sinusoidal(values: torch.Tensor, dim: int, *, max_period: float = 10_000.0) -> torch.Tensor:
    """Sinusoidal embedding (B, dim) of numbers in [0, 1], scaled by 1000 as diffusion time steps are."""
    half = dim // 2
    frequencies = max_period ** (-torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = 1000.0 * values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# Bounds of the division by 1 - t. JiT has 0.05. In runs of minutes the last part of the way then outweighs all else, so
# training weighs its errors as if the bound were 0.2.
_BOUNDS, _EQUAL_REMAINING = {"endpoint": 0.05, "target": 0.2}, 0.2


def late_weight(t: torch.Tensor) -> torch.Tensor:
    """The weight (B,) of squared errors of velocities at times t (B,): 1, and beyond t = 0.8 such that they are those
    of the end of the way, up to a factor."""
    return ((1 - t) / _EQUAL_REMAINING).clamp(max=1).square()


def as_velocity(output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, *, predict: Prediction) -> torch.Tensor:
    """The velocity (B, C, H, W) that a network's output stands for, at times t (B,) of states x.

    With "endpoint" the output is read as the end of the way, v = (output - x) / (1 - t), and training still compares
    velocities (arXiv 2511.13720, JiT). On paths whose noise shrinks with 1 - t the output is then a clean image, so the
    network need not carry the state's noise through its narrow middle, and the last step of an integration leaves none
    of it: better wherever patches are folded into channels or training is short. For other paths it is only a change of
    scale. "target" is what earlier runs have: beyond t = 0.8 their output lies past the end, noise and all.
    """
    if predict == "velocity":
        return output
    remaining = (1 - t).clamp_min(_BOUNDS[predict])
    return (output - x) / remaining.to(x.dtype)[:, None, None, None]

"""A transformer over patches as velocity network."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from timm.layers import Mlp, build_sincos2d_pos_embed
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionEmbedding, ConditionSpec
from cellflux_bridge.config.schema import Blocks, Count
from cellflux_bridge.velocity import base

_TIME_DIM = 256
_norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


def _zeroed(width: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _modulated(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return h * (1 + scale) + shift


class _Block(nn.Module):
    """Attention and an MLP, both residual. The embedding (B, width) scales and shifts what either sees, and scales what
    it adds, at first by zero (adaLN-Zero)."""

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attention = Attention(width, heads, qkv_bias=True, proj_drop=dropout)
        self.mlp = Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh"), drop=dropout)
        self.apply(_xavier)
        self.modulation = _zeroed(width, 6 * width)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        h = h + gate1 * self.attention(_modulated(self.norm1(h), shift1, scale1))
        return h + gate2 * self.mlp(_modulated(self.norm2(h), shift2, scale2))


class DiT(base.Velocity):
    """v(t, x, cond): a transformer over patches of patch x patch pixels (Peebles & Xie 2023, arXiv 2212.09748).

    `width`, `depth` (blocks) and `heads` are by default those of DiT-S, whose `mlp_ratio` is 4 and which has no
    dropout. Positions are fixed sines and cosines of the patch's row and column, so an image may have any size whose
    sides are divisible by `stride` = patch. Attention costs the square of (sides / patch): raise `patch` with the
    image. By `predict` (see `as_velocity`) the output is the end of the way; patches of so many pixels need that
    (arXiv 2511.13720, JiT). Maps of the condition lie beside the state, and its tokens beside the patches'.
    """

    def __init__(
        self,
        image_channels: int,
        spec: ConditionSpec,
        *,
        width: base.Width = 384,
        depth: Blocks = 12,
        heads: Count = 6,
        patch: Count = 8,
        mlp_ratio: Annotated[float, Field(ge=0.25, le=64)] = 4.0,
        dropout: base.Dropout = 0.0,
        predict: base.Prediction = "endpoint",
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"velocity.heads: {heads} does not divide velocity.width={width}; choose a divisor of it")
        self.spec, self.stride, self._predict = spec, patch, predict
        self.time = nn.Sequential(nn.Linear(_TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = ConditionEmbedding(spec, width, forms=("vector", "tokens", "map"))
        self.stem = nn.Conv2d(image_channels + spec.map_channels, width, patch, stride=patch)
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(_Block(width, heads=heads, hidden=hidden, dropout=dropout) for _ in range(depth))
        self.norm, self.modulation = _norm(width), _zeroed(width, 2 * width)
        self.head = _zeroed(width, image_channels * patch**2)

    def forward(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        vector, tokens, maps = self.condition(cond)
        embedding = F.silu(self.time(base.sinusoidal(t, _TIME_DIM)) + vector)
        patches = self.stem(torch.cat([x, *maps], dim=1))
        _, width, *grid = patches.shape
        h = patches.flatten(2).transpose(1, 2) + build_sincos2d_pos_embed(grid, width, device=x.device)
        num, h = h.shape[1], h if tokens is None else torch.cat([h, tokens], dim=1)
        for block in self.blocks:
            h = block(h, embedding)
        h = _modulated(self.norm(h[:, :num]), *self.modulation(embedding)[:, None].chunk(2, dim=-1))
        output = F.pixel_shuffle(self.head(h).transpose(1, 2).unflatten(2, grid), self.stride)
        return base.as_velocity(output, t, x, predict=self._predict)

"""The project's own velocity network: a U-Net with scale-shift condition."""

import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionEmbedding, ConditionSpec
from cellflux_bridge.config.schema import Blocks, Count
from cellflux_bridge.velocity import base


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4), channels)


def _zeroed(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm scaled and shifted by the condition (AdaGN, Dhariwal & Nichol 2021), SiLU, 3x3, skip."""

    def __init__(self, channels_in: int, channels_out: int, embedding_dim: int, *, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * channels_out)
        self.norm2, self.dropout = _norm(channels_out), nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head attention over all positions, and over tokens of width `token_dim` (None: none), residual; heads have
    at least `head_channels` channels."""

    def __init__(self, channels: int, *, head_channels: int, token_dim: int | None = None):
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // head_channels), 0, -1) if channels % n == 0)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.tokens = None if token_dim is None else nn.Linear(token_dim, 2 * channels)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        if tokens is not None:
            of_tokens = self.tokens(tokens).view(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([k, of_tokens[0]], dim=2), torch.cat([v, of_tokens[1]], dim=2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(b, c, height, width))


class _Block(nn.ModuleList):
    """A residual block, and attention where its level attends."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        h = self[0](x, embedding)
        return self[1](h, tokens) if len(self) > 1 else h


class UNet(base.Velocity):
    """v(t, x, cond): a U-Net over the image, or over its pixel-unshuffled form.

    `channels` times each of `multipliers` is the width of a level, every level after the first at half the size of
    the one before. `attention` lists the levels (0 the finest) that attend over all positions. `patch` > 1 folds
    patch x patch pixels into channels first (pixel unshuffle), the cheapest way to larger images. The image's sides
    must be divisible by `stride` = patch * 2^(levels - 1). `predict` says what the output means (see `as_velocity`).
    """

    def __init__(
        self,
        image_channels: int,
        spec: ConditionSpec,
        *,
        channels: base.Width = 64,
        multipliers: base.Multipliers = (1, 2, 3),
        blocks: Blocks = 2,
        attention: tuple[int, ...] = (2,),
        head_channels: Count = 32,
        dropout: base.Dropout = 0.0,
        patch: Count = 1,
        predict: base.Prediction = "endpoint",
    ):
        super().__init__()
        base.require_levels(attention, multipliers)
        if spec.has("tokens") and not attention:
            raise UserError("velocity.attention: empty, but the condition has tokens; name a level to attend to them")
        widths, dim = [channels * m for m in multipliers], 4 * channels
        deepest = len(widths) - 1
        self.spec, self._patch, self._predict, self.stride = spec, patch, predict, patch * 2**deepest
        self._time_dim = 2 * channels
        self.time = nn.Sequential(nn.Linear(self._time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.condition = ConditionEmbedding(spec, dim, forms=("vector", "tokens", "map"))
        self.stem = nn.Conv2d((image_channels + spec.map_channels) * patch**2, channels, 3, padding=1)
        token_dim = dim if spec.has("tokens") else None

        def stage(channels_in: list[int], level: int) -> nn.ModuleList:
            """Blocks of a level; `channels_in` are what each of them takes."""
            width, found = widths[level], nn.ModuleList()
            for num in channels_in:
                layers = [ResidualBlock(num, width, dim, dropout=dropout)]
                if level in attention:
                    layers.append(Attention(width, head_channels=head_channels, token_dim=token_dim))
                found.append(_Block(layers))
            return found

        self.down, self.shrink, skips = nn.ModuleList(), nn.ModuleList(), [channels]
        for level, width in enumerate(widths):
            self.down.append(stage([skips[-1], *[width] * (blocks - 1)], level))
            skips += [width] * blocks
            if level < deepest:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = stage([widths[-1]] * 2, deepest)
        self.up, self.grow, below = nn.ModuleList(), nn.ModuleList(), widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            self.up.append(stage([num + skips.pop() for num in (below, *[width] * blocks)], level))
            below = width
            if level > 0:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = _norm(widths[0])
        self.head = _zeroed(nn.Conv2d(widths[0], image_channels * patch**2, 3, padding=1))

    def forward(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        vector, tokens, maps = self.condition(cond)
        embedding = F.silu(self.time(base.sinusoidal(t, self._time_dim)) + vector)
        h = self.stem(F.pixel_unshuffle(torch.cat([x, *maps], dim=1), self._patch))
        skips = [h]
        for level, stage in enumerate(self.down):
            for block in stage:
                h = block(h, embedding, tokens)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding, tokens)
        for level, stage in enumerate(self.up):
            for block in stage:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding, tokens)
            if level < len(self.grow):
                h = self.grow[level](F.interpolate(h, scale_factor=2, mode="nearest"))
        output = F.pixel_shuffle(self.head(F.silu(self.norm(h))), self._patch)
        return base.as_velocity(output, t, x, predict=self._predict)

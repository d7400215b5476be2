"""torchcfm's ADM U-Net (Dhariwal & Nichol 2021) as velocity network."""

import torch
from torchcfm.models.unet.nn import timestep_embedding
from torchcfm.models.unet.unet import UNetModel

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionEmbedding, ConditionSpec
from cellflux_bridge.config.schema import Blocks, Count
from cellflux_bridge.velocity import base


class _ConditionedUNet(UNetModel):
    """ADM's U-Net with a condition vector in the place of its label embedding."""

    def forward(self, t: torch.Tensor, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        embedding = self.time_embed(timestep_embedding(1000.0 * t, self.model_channels)) + vector
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


class ADM(base.Velocity):
    """v(t, x, cond) by guided-diffusion's U-Net, CellFlux's backbone.

    CellFlux's own size is channels 128, multipliers (2, 2, 2), blocks 4, attention (1,), dropout 0.3. `attention`
    lists levels (0 the finest). Time in [0, 1] is scaled to the 0..1000 that its embedding is made for.
    """

    def __init__(
        self,
        image_channels: int,
        spec: ConditionSpec,
        *,
        channels: base.Width = 128,
        multipliers: base.Multipliers = (1, 2, 2),
        blocks: Blocks = 2,
        attention: tuple[int, ...] = (2,),
        head_channels: Count = 64,
        dropout: base.Dropout = 0.0,
        resblock_updown: bool = True,
        predict: base.Prediction = "velocity",
    ):
        super().__init__()
        base.require_levels(attention, multipliers)
        if channels % 32:
            raise UserError(f"velocity.channels: {channels}; the ADM U-Net has 32 groups: use a multiple of 32")
        for level in (*attention, -1):  # the middle block always attends
            if channels * multipliers[level] % head_channels:
                width = channels * multipliers[level]
                raise UserError(f"velocity.head_channels: {head_channels} does not divide the width {width}")
        self.spec, self.stride, self._predict = spec, 2 ** (len(multipliers) - 1), predict
        self.condition = ConditionEmbedding(spec, 4 * channels, forms=("vector", "map"))
        self.net = _ConditionedUNet(
            image_size=0,
            in_channels=image_channels + spec.map_channels,
            model_channels=channels,
            out_channels=image_channels,
            num_res_blocks=blocks,
            attention_resolutions=[2**a for a in attention],
            dropout=dropout,
            channel_mult=multipliers,
            num_head_channels=head_channels,
            use_scale_shift_norm=True,
            resblock_updown=resblock_updown,
        )

    def forward(self, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        vector, _, maps = self.condition(cond)
        return base.as_velocity(self.net(t, torch.cat([x, *maps], dim=1), vector), t, x, predict=self._predict)

"""Codecs: from images to the space that a flow lives in, and back."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import Config, registry


class Codec(nn.Module, ABC):
    """Carries images into the space of a flow and back. It is constructed with the number of image channels and its
    own settings; what it learned elsewhere it loads itself.

    A state has `channels` channels and 1 / `stride` of an image's sides. `scale` multiplies the code, so that states
    have a spread near 1, as the noise of paths has. A subclass defines `to_code` and `to_images`, both differentiable.
    """

    channels: int
    stride: int = 1
    scale: float = 1.0

    @abstractmethod
    def to_code(self, images: torch.Tensor) -> torch.Tensor:
        """(B, image channels, H, W) float32 in [-1, 1] -> (B, channels, H / stride, W / stride)."""

    @abstractmethod
    def to_images(self, code: torch.Tensor) -> torch.Tensor:
        """The reverse of `to_code`; values may lie outside [-1, 1]."""

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """States of images (B, image channels, H, W), which are uint8, or float in [-1, 1] where stain is jittered."""
        return self.scale * self.to_code(images if images.is_floating_point() else image_io.encode(images))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (..., image channels, H, W) of states (..., channels, h, w), float, about [-1, 1]; differentiable."""
        return self.to_images((x / self.scale).flatten(0, -4)).unflatten(0, x.shape[:-3])

    @torch.no_grad()
    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Images (..., image channels, H, W) uint8 of states (..., channels, h, w)."""
        return image_io.decode(self.decode(x))


def build_codec(config: Config) -> Codec:
    """The codec of a resolved configuration, in evaluation mode."""
    codec = registry.build("codec", config.codec, config.data.channels)
    if config.data.image_size % codec.stride:
        raise UserError(
            f"data.image_size={config.data.image_size}: not divisible by the stride {codec.stride} of "
            f"codec.name={config.codec['name']}; choose a multiple"
        )
    return codec.eval().requires_grad_(False)

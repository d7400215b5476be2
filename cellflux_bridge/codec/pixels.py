"""No code: the flow lives in the pixels."""

import torch

from cellflux_bridge.codec.base import Codec


class Pixels(Codec):
    """The identity on images in [-1, 1]."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def to_code(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def to_images(self, code: torch.Tensor) -> torch.Tensor:
        return code

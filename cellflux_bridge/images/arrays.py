"""Value ranges, sizes and crops of images in memory: the only place that knows them.

Inside, images are float32 in [-1, 1], (B, C, H, W); outside they are uint8 RGB (H, W, 3).
"""

import numpy as np
import torch
from PIL import Image


def encode(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], any shape."""
    return images.to(torch.float32) / 127.5 - 1.0


def decode(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] (values outside are clipped) -> uint8 in [0, 255], any shape."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """An RGB uint8 image at another size: area-weighted (box) when it shrinks, bicubic when it grows."""
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(rgb).resize((width, height), resampling))


def centre_crop(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle (height, width) of an image (H, W, ...)."""
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return rgb[top : top + height, left : left + width]

"""Images in memory: value ranges, sizes, and views for people.

Inside, images are float32 in [-1, 1], (B, C, H, W); outside they are uint8 RGB (H, W, 3).
"""

import numpy as np
import torch
from PIL import Image

# The colours of two channels, in halves of full strength, and of more: those of the six stains of RxRx1, the nucleus
# blue, then green, red, cyan, magenta, yellow (recursionpharma/rxrx1-utils), the mixed ones at half strength, so that
# channels that lie on each other do not become white (yuhui-zh15/CellFlux shows and scores RxRx1 so).
_TWO = [(2, 0, 2), (0, 2, 0)]
_STAINS = [(0, 0, 2), (0, 2, 0), (2, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def encode(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], any shape."""
    return images.to(torch.float32) / 127.5 - 1.0


def decode(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] (values outside are clipped) -> uint8 in [0, 255], any shape."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """A uint8 image (H, W, C) at another size: area-weighted (box) when it shrinks, bicubic when it grows."""
    if rgb.shape[:2] == (height, width):
        return rgb
    if rgb.ndim == 3 and rgb.shape[2] != 3:  # each channel by itself, which is what happens to the three of RGB
        return np.stack([resize(channel, height, width) for channel in np.moveaxis(rgb, 2, 0)], axis=2)
    shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(rgb).resize((width, height), resampling))


def centre_crop(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle (height, width) of an image (H, W, ...)."""
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return rgb[top : top + height, left : left + width]


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An RGB view (..., 3) uint8 of an image (..., C) uint8 with any number of channels C >= 1.

    One channel is grey. Two are magenta and green. Three are RGB and returned as they are. More are blue, green, red,
    and at half strength cyan, magenta and yellow (from the seventh on the colours repeat), added and cut at 255. The
    view depends on nothing but the values, so that two images may be compared by it.
    """
    channels = image.shape[-1]
    if channels == 3:
        return image
    if channels == 1:
        return image.repeat(3, axis=-1)
    colours = _TWO if channels == 2 else [_STAINS[k % 6] for k in range(channels)]
    return (image.astype(np.uint32) @ np.array(colours, np.uint32) // 2).clip(max=255).astype(np.uint8)


def sheet(rows: list[list[np.ndarray]], *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """A contact sheet of equally sized RGB uint8 tiles on white; `scale` enlarges every pixel to a square."""
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    canvas = np.full(((height + gap) * len(rows) - gap, (width + gap) * columns - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * (height + gap) :, j * (width + gap) :][:height, :width] = tile
    return canvas.repeat(scale, 0).repeat(scale, 1)

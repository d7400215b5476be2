"""Images as people look at them."""

import numpy as np

# ImageJ's order of colours for the channels of a composite.
COMPOSITE = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "white": (1, 1, 1),
    "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
    "yellow": (1, 1, 0),
}


def to_rgb(image: np.ndarray) -> np.ndarray:
    """An RGB view (..., 3) uint8 of an image (..., C) uint8 with any number of channels C >= 1.

    One channel is grey. Two are magenta and green. Three are RGB and returned as they are. Of more, channel k has
    colour k of `COMPOSITE` (from the eighth on the colours repeat); the colours are added and cut at 255.
    """
    channels = image.shape[-1]
    if channels == 3:
        return image
    if channels == 1:
        return image.repeat(3, axis=-1)
    table = list(COMPOSITE.values())
    colours = [(1, 0, 1), (0, 1, 0)] if channels == 2 else [table[k % len(table)] for k in range(channels)]
    return (image.astype(np.uint16) @ np.array(colours, np.uint16)).clip(max=255).astype(np.uint8)


def sheet(rows: list[list[np.ndarray]], *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """A contact sheet of equally sized RGB uint8 tiles on white; `scale` enlarges every pixel to a square."""
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    canvas = np.full(((height + gap) * len(rows) - gap, (width + gap) * columns - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * (height + gap) :, j * (width + gap) :][:height, :width] = tile
    return canvas.repeat(scale, 0).repeat(scale, 1)

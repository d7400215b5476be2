"""Images as people look at them."""

import numpy as np


def sheet(rows: list[list[np.ndarray]], *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """A contact sheet of equally sized RGB uint8 tiles on white; `scale` enlarges every pixel to a square."""
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    canvas = np.full(((height + gap) * len(rows) - gap, (width + gap) * columns - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * (height + gap) :, j * (width + gap) :][:height, :width] = tile
    return canvas.repeat(scale, 0).repeat(scale, 1)

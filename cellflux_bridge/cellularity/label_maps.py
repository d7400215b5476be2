"""Label maps of nuclei as files: which numbers they hold, and what is refused.

- A label map has the size of its image. 0 (black) is background; every other number, or colour, is one nucleus. It is a
  PNG or TIFF of one page, or an NPY, of whole numbers. A palette counts by index, with black as background wherever the
  palette's first colour is not black; what is fully transparent is background.
- A number may have holes and pieces that do not touch: it stays one nucleus.
- A mask, that is a map with one number only (0/1, 0/255, True), is split into its connected parts (8 neighbours).
- A map whose numbers have more than two pieces on average holds classes, not nuclei, and is refused.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage.measure import label

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import mapped

SUFFIXES = (".png", ".tif", ".tiff", ".npy")
_COLOURS = {3: (1 << 32, 1 << 16, 1), 1: (1,)}


def find_label_map(folder: Path, name: str) -> Path | None:
    """The label map of an image's name (without suffix) in a folder."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def read_label_map(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """The label map (H, W) int64 of a file, numbered 0..n, and whether a mask was split into its connected parts.

    `size` is the (H, W) of its image. Raises UserError, naming the file, for what the rules above refuse.
    """
    values = _read(path, size)
    if not np.array_equal(values, np.rint(values)) or values.min() < 0:
        raise UserError(f"{path}: expected whole numbers from 0, one for each nucleus; found other values")
    values = values.astype(np.int64)
    if values.ndim == 3:
        if values.shape[-1] in (2, 4):
            values = values[..., :-1] * (values[..., -1:] > 0)
        values = (values * _COLOURS[values.shape[-1]]).sum(axis=-1)
    numbers, labels = np.unique(values, return_inverse=True)
    if numbers[0] != 0:
        raise UserError(f"{path}: holds no background (0, or black); expected 0 wherever no nucleus is")
    labels = labels.reshape(size)
    pieces, num_pieces = label(labels, connectivity=2, return_num=True)
    num = len(numbers) - 1
    if num == 1:
        return pieces.astype(np.int64), num_pieces > 1
    if num_pieces > 2 * num:
        raise UserError(
            f"{path}: {num} numbers in {num_pieces} separate pieces are classes, not nuclei; give each nucleus its own "
            "number, or all nuclei one number (a mask)"
        )
    return labels, False


def require_size_of(path: Path, size: tuple[int, int]) -> None:
    """UserError where a label map has not the (H, W) of its image; its values are not read."""
    _read(path, size, only_size=True)


def resample(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size: of every pixel the number at its middle, numbered 1..n without what vanishes."""
    if labels.shape == size:
        return labels
    row, column = (((np.arange(to) + 0.5) * of / to).astype(int) for of, to in zip(labels.shape, size, strict=True))
    scaled = labels[row[:, None], column]
    present = np.flatnonzero(np.bincount(scaled.ravel(), minlength=1)[1:]) + 1
    number = np.zeros(labels.max() + 1, np.int32)
    number[present] = np.arange(1, len(present) + 1)
    return number[scaled]


def _read(path: Path, size: tuple[int, int], *, only_size: bool = False) -> np.ndarray | None:
    """The values (H, W) or (H, W, C) of a file, whose size is compared before they are read; or None."""
    try:
        if path.suffix == ".npy":
            values = mapped(path)
            values = values[0] if values.shape == (1, *size) else values
            _require_size(path, values.shape, size)
            if only_size:
                return None
            return np.asarray(values[..., 0] if values.shape == (*size, 1) else values)
        with Image.open(path, formats=("PNG", "TIFF")) as image:
            _require_size(path, (image.height, image.width), size)
            if getattr(image, "n_frames", 1) > 1 or image.mode == "CMYK":
                raise UserError(f"{path}: expected one page in grey, RGB or a palette")
            if only_size:
                return None
            values = np.asarray(image)
            if image.mode == "P":
                black = np.array([not any(colour) for colour in np.reshape(image.getpalette("RGB"), (-1, 3))])
                values = values * ~black[values] if not black[0] and black[values].any() else values
            return values
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise UserError(f"{path}: truncated or not an image ({error})") from error


def _require_size(path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if shape[:2] != size or shape[2:] not in ((), (1,), (3,), (4,)):
        raise UserError(f"{path}: a label map of {shape}, its image has {size}")

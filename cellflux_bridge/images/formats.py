"""Image files, value ranges and resizing: the only place that knows them.

Inside, images are float32 in [-1, 1], (B, C, H, W); outside they are uint8 RGB, and files are PNG.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cellflux_bridge.base.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Larger images are refused by their header, before anything is decoded.
MAX_PIXELS = 8192 * 8192
_GREY_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


class UnreadableImage(UserError):
    """An image file that cannot be decoded; the message names it."""


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB by mode: transparency is laid on white (glass), 16-bit grey is scaled by 1/257, palettes and CMYK by Pillow's
    conversion. 32-bit grey names no range, so its values tell: float in [0, 1] is scaled by 255, anything above 255 is
    taken for 16-bit, and the rest for 8-bit."""
    if image.mode in _GREY_16_BIT:
        values = np.asarray(image, dtype=np.float64)
        if values.size and values.min() >= 0 and values.max() <= 1 and image.mode == "F":
            values = values * 255.0
        elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257.0
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) from an image file's header, without decoding it."""
    return _open(path, lambda image: (image.height, image.width))


def read_rgb(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3), whatever its mode (see `_to_rgb`).

    Raises UnreadableImage, naming the file, for anything that is not a whole image, and for one of more than
    `MAX_PIXELS` (a decompression bomb).
    """
    return _open(path, lambda image: np.array(_to_rgb(image)))


def _open(path: Path, use):
    try:
        with warnings.catch_warnings():
            # Pillow's own limit warns first and only then refuses; ours is below and is checked before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(
                        f"{path}: {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are read; "
                        "cut it into patches first"
                    )
                return use(image)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: refused as a decompression bomb ({error})") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"truncated or not an image ({error})"
        raise UnreadableImage(f"{path}: {reason}") from error


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write an RGB uint8 image (H, W, 3) under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(rgb).save(temporary, format="PNG", compress_level=3)
    os.replace(temporary, path)

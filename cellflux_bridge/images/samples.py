"""Samples of image files as RGB of 8 bits, the right way up, by one rule for every format."""

import numpy as np
from PIL import Image

from cellflux_bridge.base.errors import UserError

# Rounding and resampling move values out of their range by a hair, a share of the range.
_HAIR = 1e-3
_TRANSPOSED = (5, 6, 7, 8)


class UnreadableImage(UserError):
    """An image file that is not read; the message names the file, what was found in it, and what to do."""


def to_uint8(values: np.ndarray, *, white: int | None = None) -> np.ndarray:
    """Samples (H, W, C) of any real type as uint8, scaled linearly so that white is 255.

    uint8 stays as it is, and true is 255. `white` is the value of white that the file states. Where it states none,
    white is the smallest of 1 (floats), 255 (floats and integers of 32 bits or more) and 65535 (these and uint16) that
    no value exceeds. 8 to 14 bits that were stored in 16 would then look like a dark image, so the brightest value must
    lie above a quarter of the range, unless all are 0. Values may leave the range by a thousandth of it (rounding).
    Raises UnreadableImage otherwise, and for NaN and infinity.
    """
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "uif" or not values.size:
        raise UnreadableImage(f"samples of type {values.dtype}, {values.size} of them; write it as 8-bit RGB")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UnreadableImage("holds NaN or infinite values; replace them and write it as 8-bit RGB")
    ranges = (1, 255, 65535) if kind == "f" else (255, 65535) if bits >= 32 else (65535,) if kind == "u" else ()
    ranges = (white,) if white else ranges
    name = {"f": "floats", "u": "integers", "i": "signed integers"}[kind]
    found = f"{bits}-bit {name} from {low:g} to {high:g}"
    if white is None:
        white = next((r for r in ranges if high <= r * (1 + _HAIR)), None)
        if white and 0 < high <= white / 4:
            raise UnreadableImage(
                f"{found}, and the file does not say which value is white: {white}, or less (8 to 14 bits of a camera)?"
                " Write it as 8-bit RGB, or state the largest value (TIFF: SMaxSampleValue; OME: SignificantBits), "
                "or set data.value_range"
            )
    if white is None or low < -white * _HAIR or high > white * (1 + _HAIR):
        expected = " or ".join(f"0 to {r}" for r in ranges) or "unsigned integers"
        raise UnreadableImage(f"{found}; expected {expected}; write it as 8-bit RGB")
    scaled = values.astype(np.float32 if bits <= 32 else np.float64) * (255 / white)
    return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)


def scaled(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Samples as uint8: low..high linearly to 0..255, cut outside; without a range they are uint8 already.

    Raises UnreadableImage for NaN, infinity, and what is no real number.
    """
    if value_range is None:
        return values
    if values.dtype.kind not in "uif":
        raise UnreadableImage(f"samples of type {values.dtype}; expected integers or floats")
    low, high = value_range
    share = (values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64) - low) / (high - low)
    if not np.isfinite(share).all():
        raise UnreadableImage("holds NaN or infinite values; replace them")
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def to_rgb(samples: np.ndarray, *, alpha: str | None = None) -> np.ndarray:
    """RGB (H, W, 3) of 8-bit grey or RGB samples (H, W, C).

    `alpha` says that the last channel is opacity, "straight" or "premultiplied" (the colours are multiplied by it
    already). Transparent pixels become white (glass).
    """
    if alpha:
        opacity = samples[..., -1:].astype(np.float32) / 255
        colour = samples[..., :-1] * (opacity if alpha == "straight" else 1) + 255 * (1 - opacity)
        samples = np.clip(np.rint(colour), 0, 255).astype(np.uint8)
    return samples if samples.shape[-1] == 3 else samples.repeat(3, axis=-1)


def pillow_to_rgb(image: Image.Image, *, of_high_bytes: bool = False) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a Pillow image of 8-bit samples, whatever its mode.

    `of_high_bytes` says that these are the upper halves of 16-bit samples, whose range is looked at as by `to_uint8`;
    where all are 0 the lower halves may hold an image of 8 bits, so this is refused, too.
    """
    if of_high_bytes:
        to_uint8(np.maximum(np.asarray(image)[..., :3].astype(np.uint16) * 257, 1))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    if image.mode == "LAB":
        raise UnreadableImage("CIELAB colours, which are not read; write it as 8-bit RGB")
    return np.array(image.convert("RGB"))


def turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """A stored image (H, W, ...) as it is shown, by the number 1..8 of the EXIF and TIFF tag 274; others leave it."""
    rgb = rgb.swapaxes(0, 1) if orientation in _TRANSPOSED else rgb
    rgb = rgb[:, ::-1] if orientation in (2, 3, 6, 7) else rgb
    return np.ascontiguousarray(rgb[::-1] if orientation in (3, 4, 7, 8) else rgb)


def turned_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """(height, width) of a stored image as it is shown."""
    return (width, height) if orientation in _TRANSPOSED else (height, width)

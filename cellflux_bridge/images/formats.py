"""Image files: PNG, JPEG, TIFF and NPY in, PNG out.

Whatever a file's suffix, its first bytes say what it is. Outside this room images are uint8 (H, W, C), for C = 3 RGB.
"""

import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cellflux_bridge.base.files import regular, replacing
from cellflux_bridge.images import samples
from cellflux_bridge.images.samples import UnreadableImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
# Larger images are refused by their header, before anything is decoded.
MAX_PIXELS = 8192 * 8192
_ORIENTATION = 274
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_MAGIC = b"\x93NUMPY"
# What stands before the EXIF or XMP data of a PNG file.
_EXIF = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


def read_size(path: Path, *, channels: int = 3) -> tuple[int, int]:
    """(height, width) of what `read` gives, without decoding it."""
    with _opened(path) as image:
        _require(image, channels)
        return image.height, image.width


def read_rgb(path: Path) -> np.ndarray:
    """A PNG, JPEG, TIFF or NPY file as RGB uint8 (H, W, 3), turned as its EXIF or TIFF orientation says.

    Grey becomes three equal channels; palettes and CMYK are converted; transparent pixels become white (glass). Samples
    of other types than uint8 are scaled as `samples.to_uint8` says. Of several images in a TIFF file the one of full
    resolution is read (see `tiff.TIFFImage`). NPY files hold uint8 (H, W, 3) or (H, W).

    Raises UnreadableImage, which names the file, for anything that is not a whole image of one of these formats, for
    z-stacks, time series and channels other than grey and RGB, for samples whose range nobody states, and for more than
    8192 x 8192 pixels (a decompression bomb).
    """
    with _opened(path) as image:
        rgb = image.read()
        if rgb.shape != (image.height, image.width, 3):
            raise UnreadableImage(f"{rgb.shape} samples in an image of {image.width} x {image.height} pixels")
        return rgb


def read(path: Path, *, channels: int = 3) -> np.ndarray:
    """An image file as uint8 (H, W, channels): as `read_rgb` where there are three, otherwise a NPY file of so many.

    Raises UnreadableImage, too, for a file of another number of channels.
    """
    if channels == 3:
        return read_rgb(path)
    with _opened(path) as image:
        _require(image, channels)
        return np.array(image.array).reshape(image.height, image.width, channels)


def _require(image: Any, channels: int) -> None:
    """UnreadableImage for an open image of another number of channels."""
    if isinstance(image, _NPYImage):
        shape = image.array.shape
        if shape[2:] != (channels,) and not (len(shape) == 2 and channels in (1, 3)):
            raise UnreadableImage(
                f"an array of uint8 of shape {shape}; data.channels={channels} is (H, W, {channels})"
                + (" or (H, W)" if channels in (1, 3) else "")
            )
    elif channels != 3:
        raise UnreadableImage(
            f"a picture; data.channels={channels} is read from .npy files, uint8 (H, W, {channels}): save it so, or "
            "set data.channels=3"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image in a file: `height`, `width`, and `read()` for its pixels."""
    try:
        with warnings.catch_warnings(), open(regular(path), "rb") as file:
            # Decoders warn of what they doubt, Pillow also of its own limit of size; ours is below.
            warnings.simplefilter("ignore")
            head = file.read(6)
            file.seek(0)
            if head[:4] in _TIFF_MAGIC:
                from cellflux_bridge.images.tiff import TIFFImage

                image = TIFFImage(file)
            else:
                image = _NPYImage(path) if head == _NPY_MAGIC else _PillowImage(file)
            if image.width * image.height > MAX_PIXELS:
                found = f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are read"
                raise UnreadableImage(f"{found}; cut it into patches first")
            yield image
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path}: no such file") from error
    except UnreadableImage as error:
        raise UnreadableImage(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path}: refused as a decompression bomb ({error})") from error
    except Exception as error:  # decoders stumble over damaged files in many ways
        raise UnreadableImage(f"{path}: truncated or not a PNG, JPEG, TIFF or NPY image ({error})") from error


class _NPYImage:
    """A NumPy array file of uint8 (H, W, C) or (H, W); nothing in it is unpickled."""

    def __init__(self, path: Path):
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) not in (2, 3) or not self.array.size:
            found = f"{dtype} of shape {shape}"
            raise UnreadableImage(f"an array of {found}; expected uint8 of shape (H, W, 3) or (H, W)")
        self.height, self.width = shape[:2]

    def read(self) -> np.ndarray:
        _require(self, 3)
        return samples.to_rgb(np.array(self.array.reshape(self.height, self.width, -1)))


class _PillowImage:
    """A PNG or JPEG file."""

    def __init__(self, file: BinaryIO):
        self._image = image = Image.open(file, formats=("PNG", "JPEG"))
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise UnreadableImage(f"an animated PNG of {image.n_frames} images; save the one that is meant")
        # EXIF data may stand after the pixels of a PNG, which Pillow would decode to look for it.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            may_be_turned = image.format != "PNG" or any(data.find(mark) >= 0 for mark in _EXIF)
        self._orientation = image.getexif().get(_ORIENTATION, 1) if may_be_turned else 1
        self.height, self.width = samples.turned_size(image.height, image.width, self._orientation)

    def read(self) -> np.ndarray:
        image = self._image
        # Of 16-bit colour Pillow gives the upper bytes.
        upper = image.mode in ("RGB", "RGBA") and image.format == "PNG" and ";16" in str(image.tile)
        if image.mode.startswith("I"):
            rgb = samples.to_rgb(samples.to_uint8(np.array(image, np.uint16)[..., None]))
        else:
            rgb = samples.pillow_to_rgb(image, of_high_bytes=upper)
        return samples.turned(rgb, self._orientation)


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write an RGB uint8 image (H, W, 3) under a temporary name, then rename it."""
    with replacing(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG", compress_level=3)

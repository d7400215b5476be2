"""Image files: PNG, JPEG, TIFF and NPY in, PNG out.

Whatever a file's suffix, its first bytes say what it is. Outside this room images are uint8 (H, W, C), for C = 3 RGB.
"""

import mmap
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cellflux_bridge.base.files import mapped, regular, replacing
from cellflux_bridge.images import samples
from cellflux_bridge.images.samples import UnreadableImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
# Larger images are refused by their header, before anything is decoded.
MAX_PIXELS = 8192 * 8192
_ORIENTATION = 274
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_MAGIC = b"\x93NUMPY"
_BRACES = re.compile(r"\{[^{},/]+(?:,[^{},/]+)+\}")
# What stands before the EXIF or XMP data of a PNG file.
_EXIF = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


def files_of(path: Path) -> list[Path]:
    """The files that hold an image: the path itself or, of one file per channel, those that it names in braces.

    `well/s1_{w1,w2}.png` stands for `well/s1_w1.png` and `well/s1_w2.png`, unless a file has just that name.
    """
    text = str(path)
    if "{" not in text or not (lists := _BRACES.findall(text)) or os.path.lexists(path):
        return [path]
    return [Path(text.replace(lists[-1], name)) for name in lists[-1][1:-1].split(",")]


def stat_of(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns of an image: of several files their sum and the last one."""
    stats = [os.stat(file) for file in (files_of(Path(path)) if "{" in str(path) else (path,))]
    return sum(status.st_size for status in stats), max(status.st_mtime_ns for status in stats)


def read_size(path: Path, *, channels: int = 3, value_range: tuple[float, float] | None = None) -> tuple[int, int]:
    """(height, width) of what `read` gives, without decoding it."""
    sizes = []
    for file, num in _by_channels(path, channels):
        with _opened(file, channels=None if num == 3 and value_range is None else num) as image:
            _require(image, num, value_range)
            sizes.append((image.height, image.width))
    return _equal(sizes, path)


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


def read(path: Path, *, channels: int = 3, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """An image as uint8 (H, W, channels), from one file or from one file per channel (see `files_of`).

    Three channels of uint8 are RGB, read as `read_rgb` does. Otherwise the file holds just these channels: a NPY file
    (H, W, C), a TIFF stack whose channels lie first or last, or, of one channel, a grey PNG or JPEG. `value_range`
    scales the samples of every file, whatever their type, linearly from (low, high) to 0..255, cutting what lies
    outside; without one only uint8 is read.

    Raises UnreadableImage as `read_rgb` does, and for a file of another number of channels, samples of another type
    and channels of different sizes.
    """
    planes = []
    for file, num in _by_channels(path, channels):
        if num == 3 and value_range is None:
            return read_rgb(file)
        with _opened(file, channels=num) as image:
            _require(image, num, value_range)
            planes.append(samples.scaled(image.samples(), value_range))
    _equal([plane.shape[:2] for plane in planes], path)
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _by_channels(path: Path, channels: int) -> list[tuple[Path, int]]:
    """The files of an image, each with its number of channels."""
    files = files_of(path)
    if len(files) == 1:
        return [(path, channels)]
    if len(files) != channels:
        raise UnreadableImage(f"{path}: names {len(files)} files of one channel each; data.channels={channels}")
    return [(file, 1) for file in files]


def _equal(sizes: list[tuple[int, int]], path: Path) -> tuple[int, int]:
    """The one size of the channels of an image; UnreadableImage, which names each file, where there are several."""
    if len(set(sizes)) > 1:
        files = zip(files_of(path), sizes, strict=True)
        found = ", ".join(f"{file.name} ({width} x {height})" for file, (height, width) in files)
        raise UnreadableImage(f"{path}: the channels' files differ in size: {found}")
    return sizes[0]


def _require(image: Any, channels: int, value_range: tuple[float, float] | None) -> None:
    """UnreadableImage for an open image of another number of channels, or of samples whose range nobody states."""
    if isinstance(image, _NPYImage):
        shape, dtype = image.array.shape, image.dtype
        grey_will_do = channels == 1 or (channels == 3 and value_range is None)
        if shape[2:] != (channels,) and not (len(shape) == 2 and grey_will_do):
            raise UnreadableImage(
                f"an array of {dtype} of shape {shape}; data.channels={channels} is (H, W, {channels})"
                + (" or (H, W)" if grey_will_do else "")
            )
    elif channels == 3 and value_range is None:
        return
    elif image.channels != channels:
        raise UnreadableImage(
            f"a picture; data.channels={channels} is read from .npy files (H, W, {channels}), from TIFF stacks of "
            f"{channels} grey channels, or from one grey file per channel: save it so, or set data.channels"
        )
    if value_range is None and image.dtype != np.uint8:
        raise UnreadableImage(
            f"holds {image.dtype}; set data.value_range=[low, high], the values that become 0 and 255, or save uint8"
        )


@contextmanager
def _opened(path: Path, *, channels: int | None = None) -> Iterator[Any]:
    """The image in a file: `height`, `width`, and `read()` for its pixels as RGB or, where so many `channels` are
    asked for, `channels`, `dtype` and `samples()` (H, W, channels) as they are stored."""
    try:
        with warnings.catch_warnings(), open(regular(path), "rb") as file:
            # Decoders warn of what they doubt, Pillow also of its own limit of size; ours is below.
            warnings.simplefilter("ignore")
            head = file.read(6)
            file.seek(0)
            if head[:4] in _TIFF_MAGIC:
                from cellflux_bridge.images.tiff import TIFFImage, TIFFStack

                image = TIFFStack(file, channels) if channels else TIFFImage(file)
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
    """A NumPy array file (H, W, C) or (H, W); nothing in it is unpickled."""

    def __init__(self, path: Path):
        self.array = mapped(path)
        shape, self.dtype = self.array.shape, self.array.dtype
        if len(shape) not in (2, 3) or not self.array.size:
            raise UnreadableImage(f"an array of {self.dtype} of shape {shape}; expected (H, W, C) or (H, W)")
        self.height, self.width = shape[:2]

    def read(self) -> np.ndarray:
        _require(self, 3, None)
        return samples.to_rgb(self.samples())

    def samples(self) -> np.ndarray:
        return np.array(self.array).reshape(self.height, self.width, -1)


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
        self.channels = {"L": 1, "I": 1, "I;16": 1, "RGB": 3}.get(image.mode, 0)  # 0: such as are no channels
        if "transparency" in image.info or (image.mode == "RGB" and ";16" in str(image.tile)):
            self.channels = 0
        self.dtype = np.dtype(np.uint16 if image.mode.startswith("I") else np.uint8)

    def samples(self) -> np.ndarray:
        values = np.array(self._image, self.dtype).reshape(self._image.height, self._image.width, -1)
        return samples.turned(values, self._orientation)

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

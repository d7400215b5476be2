"""TIFF files: which of their images is meant, and its samples.

tifffile reads the structure of every file, and the samples where it needs no further package; Pillow reads the others:
palettes, CMYK, fewer than 8 bits, and most compressions.
"""

import logging
import re
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image
from tifffile import TiffFile, TiffPage, TiffPageSeries

from cellflux_bridge.images import samples
from cellflux_bridge.images.samples import UnreadableImage

# tifffile logs what it doubts. What matters is said by the error.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_MOST_PAGES = 10_000
_CAMERA_BITS = (8, 10, 12, 14, 16)
_REDUCED, _MASK = 1, 4
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_UNCOMPRESSED, _JPEG, _DEFLATE = 1, (6, 7), (8, 32946)
_ALONE = "save the one that is meant as a file of its own"
_ALPHA = {1: "premultiplied", 2: "straight"}


class TIFFImage:
    """The one image of a TIFF file that is meant; `height` and `width` are those of the image as it is shown.

    Of several it is the largest, where the others are marked as reduced or as masks, or are smaller copies of it
    (thumbnails, levels of a pyramid). Channels may lie in the samples or in pages that the file calls channels (OME,
    ImageJ). Raises UnreadableImage for z-stacks, time series and other pages, and for channels other than grey and RGB.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._tiff = TiffFile(file, _multifile=False)  # other files that OME-XML names stay closed
        if (num := len(self._tiff.pages)) > _MOST_PAGES:
            raise UnreadableImage(f"holds {num} pages; {_ALONE}")
        self._series = _meant(self._tiff)
        self._page = self._series.keyframe
        self._channels = _num_channels(self._series)
        self._orientation = self._page.tags.valueof(274, default=1)
        self.height, self.width = samples.turned_size(*_size(self._series), self._orientation)

    def read(self) -> np.ndarray:
        """RGB uint8 (height, width, 3); see `samples.to_uint8` for how values of other types are scaled."""
        page = self._page
        plain = page.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB) and page.bitspersample in (8, 16, 32, 64)
        if plain and page.compression in (_UNCOMPRESSED, *_DEFLATE):
            return samples.turned(self._by_tifffile(), self._orientation)
        planes = [self._by_pillow(page) for page in self._series.pages]
        return planes[0] if len(planes) == 1 else np.dstack([plane[..., 0] for plane in planes])

    def _by_tifffile(self) -> np.ndarray:
        page, shape, num = self._page, _size(self._series), self._channels
        for one in self._series.pages:
            _require_whole(one, page, self._tiff)
        channels_first = self._series.axes.find("Y") > max(self._series.axes.find(axis) for axis in "SC") >= 0
        values = self._series.asarray().reshape((num, *shape) if channels_first else (*shape, num))
        values = np.moveaxis(values, 0, -1) if channels_first else values
        colours = 3 if num >= 3 else 1
        white = _stated_white(self._tiff, page)
        colour = samples.to_uint8(values[..., :colours], white=white)
        colour = 255 - colour if page.photometric == _MIN_IS_WHITE else colour
        alpha = _ALPHA.get(int(page.extrasamples[0])) if num > colours else None
        if alpha is None:
            return samples.to_rgb(colour)
        full = 1 if page.dtype.kind == "f" else np.iinfo(page.dtype).max
        opacity = samples.to_uint8(values[..., colours : colours + 1], white=white or full)
        return samples.to_rgb(np.concatenate([colour, opacity], axis=-1), alpha=alpha)

    def _by_pillow(self, page: TiffPage) -> np.ndarray:
        first, bits = self._page, self._page.bitspersample
        if (first.photometric == _YCBCR and first.compression not in _JPEG) or (
            first.planarconfig == 2 and first.samplesperpixel > 1 and bits > 8
        ):
            kind = f"{first.photometric.name}, {bits} bits, {first.compression.name} compression"
            raise UnreadableImage(f"{kind}, which is not read; write it as 8-bit RGB")
        if first.photometric == _PALETTE:
            samples.to_uint8(np.asarray(first.colormap)[..., None])  # its entries have 16 bits
        self._file.seek(0)
        with Image.open(self._file, formats=("TIFF",)) as image:
            image.seek(page.index)
            if image.mode[0] not in "IF":
                return samples.pillow_to_rgb(image, of_high_bytes=bits > 8)
            image.load()
            values = np.asarray(image).astype(first.dtype)[..., None]
            grey = samples.to_uint8(values, white=_stated_white(self._tiff, first))
            return samples.to_rgb(255 - grey if first.photometric == _MIN_IS_WHITE else grey)


class TIFFStack:
    """The `channels` of a TIFF file as they are stored: (`height`, `width`, `channels`) of `dtype`.

    They are the pages or samples that the file calls channels, or pages without a name, which NumPy arrays are saved
    as, (C, H, W) or (H, W, C). Raises UnreadableImage for z-stacks, time series and colours that are no channels.
    """

    def __init__(self, file: BinaryIO, channels: int):
        self._file, self._tiff = file, TiffFile(file, _multifile=False)
        if (num := len(self._tiff.pages)) > _MOST_PAGES:
            raise UnreadableImage(f"holds {num} pages; {_ALONE}")
        self._series = series = _meant(self._tiff)
        self._page, self.dtype = series.keyframe, np.dtype(series.dtype)
        described = f"axes {series.axes}: {' x '.join(map(str, series.shape))}"
        kind = self._page.photometric
        if series.dtype is None or kind not in (_MIN_IS_BLACK, _RGB) or self._page.bitspersample not in (8, 16, 32, 64):
            raise UnreadableImage(f"{kind.name}, {self._page.bitspersample} bits: no grey channels of 8, 16 or 32 bits")
        axes = [i for i, (a, n) in enumerate(zip(series.axes, series.shape, strict=True)) if n > 1 or a in "YX"]
        self._shape = tuple(series.shape[i] for i in axes)
        names = "".join(series.axes[i] for i in axes)
        stacked = names.strip("YX")
        if len(stacked) > 1 or stacked in ("Z", "T"):
            raise UnreadableImage(f"no stack of {channels} channels ({described}); save it as one, axes CYX")
        self._last = len(names) == 3 and (names[-1] == stacked or (self._shape[0] != channels == self._shape[-1]))
        self.channels = 1 if len(names) == 2 else self._shape[-1 if self._last else 0]
        if self.channels != channels:
            raise UnreadableImage(f"has {self.channels} channels ({described}); data.channels={channels}")
        stored = self._shape[:2] if self._last else self._shape[-2:]
        self._orientation = self._page.tags.valueof(274, default=1)
        self.height, self.width = samples.turned_size(*stored, self._orientation)

    def samples(self) -> np.ndarray:
        if self._page.compression in (_UNCOMPRESSED, *_DEFLATE):
            for page in self._series.pages:
                _require_whole(page, self._page, self._tiff)
            values = self._series.asarray()
        else:
            values = np.stack([self._by_pillow(page) for page in self._series.pages])
        values = values.reshape(self._shape if len(self._shape) == 3 else (1, *self._shape))
        return samples.turned(values if self._last else np.moveaxis(values, 0, -1), self._orientation)

    def _by_pillow(self, page: TiffPage) -> np.ndarray:
        self._file.seek(0)
        with Image.open(self._file, formats=("TIFF",)) as image:
            image.seek(page.index)
            values = np.asarray(image)
        if values.shape != page.shape or values.dtype.itemsize < self.dtype.itemsize:
            raise UnreadableImage(f"{self._page.compression.name} compression is not read here; save it uncompressed")
        return values.astype(self.dtype)


def _size(series: TiffPageSeries) -> tuple[int, int]:
    return series.keyframe.imagelength, series.keyframe.imagewidth


def _is_smaller_copy(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """At most half as large, and of the same shape but for the rounding of one pixel."""
    (h, w), (height, width) = size, of
    return 2 * h <= height + 1 and 2 * w <= width + 1 and abs(h * width - w * height) <= max(of)


def _meant(tiff: TiffFile) -> TiffPageSeries:
    images = [series for series in tiff.series if not series.keyframe.subfiletype & _MASK] or tiff.series
    whole = [series for series in images if not series.keyframe.subfiletype & _REDUCED]
    largest = max(whole + images, key=lambda series: np.prod(_size(series)))  # of equals the first: one not reduced
    inside = [page for series in images for page in series.keyframe.pages or ()]
    if any(page.imagelength * page.imagewidth > np.prod(_size(largest)) for page in inside):
        raise UnreadableImage("its full-resolution image lies in a sub-IFD; save that as a file of its own")
    others = [one for one in whole if one is not largest and not _is_smaller_copy(_size(one), _size(largest))]
    if others:
        sizes = ", ".join(f"{width} x {height}" for height, width in map(_size, (largest, *others[:4])))
        raise UnreadableImage(f"holds {1 + len(others)} images ({sizes} pixels); {_ALONE}")
    return largest


def _num_channels(series: TiffPageSeries) -> int:
    """1 grey, 2 grey and opacity, 3 RGB, 4 RGB and opacity or an unnamed channel, CMYK; UnreadableImage otherwise."""
    sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1}
    page = series.keyframe
    described = f"axes {series.axes}: {' x '.join(map(str, series.shape))}"
    if stacked := sizes.keys() - {"Y", "X", "S", "C"}:
        num = np.prod([sizes[axis] for axis in stacked])
        kinds = {"Z": "a z-stack", "T": "a time series"}
        what = " and ".join(kinds.get(axis, "pages that are not called channels") for axis in sorted(stacked))
        raise UnreadableImage(f"holds {num} images, {what} ({described}); {_ALONE}, RGB as (H, W, 3)")
    num = sizes.get("C", 1) * sizes.get("S", 1)
    if num * page.imagelength * page.imagewidth != np.prod(series.shape):
        raise UnreadableImage(f"its pages are not of one size ({described}); {_ALONE}")
    is_alpha = bool(page.extrasamples) and int(page.extrasamples[0]) in _ALPHA
    in_samples = sizes.get("C", 1) == 1
    is_grey = page.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK)
    if num not in (1, 3) and not (in_samples and ((num == 2 and is_alpha) or (num == 4 and not is_grey))):
        raise UnreadableImage(f"has {num} channels ({described}); expected grey or RGB")
    return num


def _stated_white(tiff: TiffFile, page: TiffPage) -> int | None:
    """The largest possible value of integers, where the file states it.

    That is by BitsPerSample between 8 and 16, SignificantBits of OME, or the tags SMaxSampleValue and MaxSampleValue.
    Some programs write the largest value that occurs into the tags, so the next number of bits of a camera is taken.
    """
    bits = page.bitspersample
    if page.dtype is None or page.dtype.kind == "f" or bits <= 8:
        return None
    if bits not in (16, 32, 64):
        return 2**bits - 1
    if tiff.is_ome and (found := re.search(r'\bSignificantBits="(\d{1,2})"', tiff.ome_metadata)):
        return 2 ** int(found[1]) - 1
    stated = page.tags.valueof(341, default=page.tags.valueof(281, default=None))
    if not stated or not np.max(stated) > 0:
        return None
    return next((2**bits - 1 for bits in _CAMERA_BITS if np.max(stated) < 2**bits), None)


def _require_whole(page: TiffPage, first: TiffPage, tiff: TiffFile) -> None:
    """ValueError where the data of a page is not all there, UnreadableImage where it unpacks to more than has room."""
    size = tiff.filehandle.size
    counts, offsets = page.databytecounts, page.dataoffsets
    if not counts or any(not count or offset + count > size for offset, count in zip(offsets, counts, strict=True)):
        raise ValueError("data that its header names is not there")
    room = int(np.prod(first.chunks)) * first.dtype.itemsize
    if room > max(first.nbytes, 2**24):
        raise UnreadableImage(f"its tiles are larger than it ({first.chunks}); write it without tiles")
    total = sum(counts)
    if first.compression in _DEFLATE:
        total = 0
        for offset, count in zip(offsets, counts, strict=True):
            tiff.filehandle.seek(offset)
            unpacked = len(zlib.decompressobj().decompress(tiff.filehandle.read(count), room + 1))
            if unpacked > room:
                raise UnreadableImage("refused as a decompression bomb: its data unpacks to more than its header says")
            total += unpacked
    if total < first.nbytes:
        raise ValueError("it holds fewer samples than its header says")

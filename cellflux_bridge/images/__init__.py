"""Images: files, values, stain, pictures."""

from cellflux_bridge.images.arrays import centre_crop, decode, encode, resize, sheet, to_rgb
from cellflux_bridge.images.formats import MAX_PIXELS, SUFFIXES, read, read_rgb, read_size, write_png
from cellflux_bridge.images.samples import UnreadableImage

__all__ = [
    "MAX_PIXELS", "SUFFIXES", "UnreadableImage", "centre_crop", "decode", "encode", "read", "read_rgb", "read_size",
    "resize", "sheet", "to_rgb", "write_png",
]  # fmt: skip

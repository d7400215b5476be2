"""Images: files, values, stain, pictures."""

from cellflux_bridge.images.arrays import centre_crop, decode, encode, resize, sheet, to_rgb
from cellflux_bridge.images.formats import MAX_PIXELS, SUFFIXES, files_of, read, read_rgb, read_size, stat_of, write_png
from cellflux_bridge.images.samples import UnreadableImage

__all__ = [
    "MAX_PIXELS", "SUFFIXES", "UnreadableImage", "centre_crop", "decode", "encode", "files_of", "read", "read_rgb",
    "read_size", "resize", "sheet", "stat_of", "to_rgb", "write_png",
]  # fmt: skip

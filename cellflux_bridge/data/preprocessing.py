"""From an image file's pixels to what the network sees: scale, stain, crop. It travels in every checkpoint."""

from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular
from cellflux_bridge.data.settings import DataConfig, ValueRange
from cellflux_bridge.images import stain

_Side = Annotated[int, Field(ge=1, le=images.MAX_PIXELS)]


def require_no_enlargement(
    config: DataConfig, preprocessing: "Preprocessing", height: int, width: int, *, name: str
) -> None:
    """UserError where a file would be enlarged for training and the configuration does not ask for that."""
    if not config.enlarge and (scale := preprocessing.scale_of(height, width)) > 1:
        shown = preprocessing.crop or min(height, width)
        raise UserError(
            f"{name}: {shown} px would be enlarged to data.image_size={preprocessing.image_size} ({scale:.2g} times), "
            "which adds no detail; lower image_size, raise data.crop, or set data.enlarge=true"
        )


@dataclass(frozen=True)
class Preprocessing:
    """How a uint8 image of any size becomes an (image_size, image_size, channels) patch.

    `crop` is the side, in the file's own pixels, of the square that one patch shows; it is scaled to `image_size`
    pixels (None: the shorter side of the whole image is). `reference` is the stain that images are normalised to.
    `value_range` holds the values of a file that become 0 and 255 (see `images.read`).
    """

    image_size: _Side
    crop: _Side | None = None
    reference: stain.StainReference | None = None
    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    value_range: ValueRange | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "Preprocessing":
        """As a configuration says, without a stain to normalise to."""
        return cls(config.image_size, config.crop, channels=config.channels, value_range=config.value_range)

    def read(self, file: Path) -> np.ndarray:
        """An image file, uint8 (H, W, channels)."""
        return images.read(file, channels=self.channels, value_range=self.value_range)

    def read_size(self, file: Path) -> tuple[int, int]:
        """(height, width) of an image file, which is not decoded."""
        return images.read_size(file, channels=self.channels, value_range=self.value_range)

    def scale_of(self, height: int, width: int) -> float:
        """The network's pixels for one of an image file's."""
        return self.image_size / (self.crop or min(height, width))

    def scaled_size(self, height: int, width: int, *, name: str) -> tuple[int, int]:
        """Size of a whole image at the network's scale; UserError where it is smaller than one patch."""
        if self.crop is not None and min(height, width) < self.crop:
            raise UserError(
                f"{name}: {width} x {height} pixels, smaller than data.crop={self.crop}; "
                "lower data.crop or leave such images out"
            )
        scale = self.scale_of(height, width)
        return max(self.image_size, round(height * scale)), max(self.image_size, round(width * scale))

    def prepare(self, rgb: np.ndarray, *, name: str) -> np.ndarray:
        """The whole image at the network's scale with its stain normalised: training and translation cut it alike."""
        scaled = images.resize(rgb, *self.scaled_size(*rgb.shape[:2], name=name))
        return scaled if self.reference is None else stain.normalise(scaled, self.reference)

    def cut(self, prepared: np.ndarray, height: int, width: int) -> np.ndarray:
        """A (height, width) part of a prepared image, both at least `image_size`; its middle patch is the image's."""
        top, left = (
            (whole - self.image_size) // 2 - (part - self.image_size) // 2
            for whole, part in zip(prepared.shape[:2], (height, width), strict=True)
        )
        return prepared[top : top + height, left : left + width]

    def __call__(self, rgb: np.ndarray, *, name: str) -> np.ndarray:
        """The middle patch of an image, as the network sees it."""
        return self.cut(self.prepare(rgb, name=name), self.image_size, self.image_size)

    def save(self, path: Path) -> None:
        path.write_text(dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        try:
            return TypeAdapter(cls).validate_json(regular(path).read_bytes(), strict=True)
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UserError(f"{path}: cannot be read as preprocessing ({reason})") from error

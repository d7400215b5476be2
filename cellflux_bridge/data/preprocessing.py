"""From an image file's pixels to what the network sees: scale, stain, crop. It travels in every checkpoint."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import stain


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB uint8 image of any size becomes an (image_size, image_size, 3) patch.

    `crop` is the side, in the file's own pixels, of the square that one patch shows; it is scaled to `image_size`
    pixels (None: the shorter side of the whole image is). `reference` is the stain that images are normalised to.
    """

    image_size: int
    crop: int | None = None
    reference: stain.StainReference | None = None

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

    def scale(self, rgb: np.ndarray, *, name: str) -> np.ndarray:
        """The whole image at the network's scale, stain as it is."""
        return images.resize(rgb, *self.scaled_size(*rgb.shape[:2], name=name))

    def normalise(self, rgb: np.ndarray) -> np.ndarray:
        return rgb if self.reference is None else stain.normalise(rgb, self.reference)

    def __call__(self, rgb: np.ndarray, *, name: str) -> np.ndarray:
        """The middle patch of an image, as the network sees it."""
        return images.centre_crop(self.normalise(self.scale(rgb, name=name)), self.image_size, self.image_size)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            reference = data.pop("reference")
            if reference is not None:
                reference = stain.StainReference(reference["method"], tuple(reference["values"]))
            return cls(**data, reference=reference)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a checkpoint's preprocessing ({error})") from error

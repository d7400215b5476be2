"""What a translation starts from: files, arrays, pictures or patches of a split, as uint8 patches with names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.preprocessing import Preprocessing

# What `Translator.translate` takes.
Images = str | Path | np.ndarray | Image.Image | torch.Tensor | Sequence[str | Path | np.ndarray | Image.Image]


class Sources(NamedTuple):
    """Sources by number: their names, and patches(numbers) -> (B, C, S, S) uint8. Where they are known, batches (N,)
    int64 that the sources belong to, doses (N,) float32 of their targets, and targets (N,) int64, numbers of classes,
    where they have not all one."""

    ids: list[str]
    patches: Callable[[Sequence[int]], torch.Tensor]
    batches: np.ndarray | None = None
    doses: np.ndarray | None = None
    targets: np.ndarray | None = None

    def context(self, numbers: Sequence[int]) -> "Context":
        """What is known of some sources beside their pixels."""
        known = (self.batches, self.doses, self.targets)
        return Context(*(None if column is None else torch.from_numpy(column[list(numbers)]) for column in known))


class Context(NamedTuple):
    """Of B sources, where known: batches (B,) int64, doses (B,) float32 of their targets, and targets (B,) int64."""

    batches: torch.Tensor | None = None
    doses: torch.Tensor | None = None
    targets: torch.Tensor | None = None


def of_split(patches: Patches, chosen: np.ndarray) -> Sources:
    """The chosen patches of a data set, without their random windows."""
    ids, batches = [patches.ids[i] for i in chosen], patches.batches[chosen]
    return Sources(ids, lambda numbers: patches.centre(chosen[np.asarray(numbers)]), batches)


def of_images(images: Images, preprocessing: Preprocessing) -> Sources:
    """What a user gives, scaled and cropped as training patches are when it is asked for. UserError names what is
    none of `Images`."""
    if isinstance(images, torch.Tensor):
        size, num = preprocessing.image_size, preprocessing.channels
        batch = images[None] if images.ndim == 3 else images
        if batch.dtype != torch.uint8 or batch.shape[1:] != (num, size, size) or len(batch) == 0:
            raise UserError(
                f"images: expected uint8 (B, {num}, {size}, {size}), found {images.dtype} {tuple(images.shape)}; "
                f"give files or (H, W, {num}) arrays to have them scaled"
            )
        return Sources([str(i) for i in range(len(batch))], lambda numbers: batch[list(numbers)])
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        folder, images = Path(images), image_files(Path(images))
        if not images:
            raise UserError(f"{folder}: holds no image ({', '.join(image_io.SUFFIXES)})")
        names = [file.relative_to(folder).as_posix() for file in images]
        _require_readable(folder, images, preprocessing)
    else:
        is_one = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4)
        images = [images] if is_one else list(images)
        if not images:
            raise UserError("images: none given")
        by_name = all(isinstance(image, (str, Path)) for image in images)
        names = [str(image) if by_name else str(number) for number, image in enumerate(images)]

    def patches(numbers: Sequence[int]) -> torch.Tensor:
        found = []
        for number in numbers:
            image, name = _array(images[number], preprocessing, name=f"images[{number}]")
            found.append(preprocessing(image, name=name))
        return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2).copy())

    return Sources(names, patches)


def _require_readable(folder: Path, files: Sequence[Path], preprocessing: Preprocessing) -> None:
    """UserError that lists the files which cannot be used, before the first is carried; their pixels are not read."""
    errors = []
    for file in files:
        try:
            preprocessing.scaled_size(*preprocessing.read_size(file), name=str(file))
        except UserError as error:
            errors.append(str(error))
    if errors:
        shown = abbreviate([f"\n  {error}" for error in errors], limit=10)
        raise UserError(f"{folder}: {len(errors)} of {len(files)} images cannot be used; mend or remove them:{shown}")


def _array(image: Any, preprocessing: Preprocessing, *, name: str) -> tuple[np.ndarray, str]:
    """An image as uint8 (H, W, channels), and its name for errors."""
    if isinstance(image, (str, Path)):
        return preprocessing.read(Path(image)), str(image)
    num = preprocessing.channels
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    what = "RGB uint8 array (H, W, 3)" if num == 3 else f"uint8 array (H, W, {num})"
    if not isinstance(image, np.ndarray):
        found = type(image).__name__
        raise UserError(f"{name}: expected a file, a PIL image or an {what}, found {found}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != num:
        raise UserError(f"{name}: expected {what.replace(' array', '')}, found {image.dtype} {image.shape}")
    return image, name

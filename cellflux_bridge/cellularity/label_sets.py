"""Folders of images with label maps, as crops of any scale and direction to train on."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.label_maps import read_label_map, require_size_of
from cellflux_bridge.cellularity.settings import LabelSet
from cellflux_bridge.cellularity.validation import paired_files
from cellflux_bridge.images import read_rgb, read_size

# How often an image is halved beforehand, so that small scales do not alias.
_HALVINGS = 3
# Decoded images that stay in memory.
_MOST_DECODED = 512


class Crop(NamedTuple):
    """RGB (H, W, 3) float32 in [0, 1], its label map (H, W), and the diameter in px of the whole of every nucleus by
    number (max + 1,); `is_foreground` where touching nuclei have one number."""

    rgb: np.ndarray
    labels: np.ndarray
    diameters: np.ndarray
    is_foreground: bool = False


class _Decoded(NamedTuple):
    pyramid: list[torch.Tensor]  # (1, 3, H / 2^n, W / 2^n) uint8
    labels: torch.Tensor  # (1, 1, H, W) float32
    diameters: np.ndarray


@lru_cache(maxsize=_MOST_DECODED)
def _decode(image: Path, label_map: Path) -> _Decoded:
    rgb = read_rgb(image)
    labels, _ = read_label_map(label_map, rgb.shape[:2])
    levels = [torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None].float()]
    while len(levels) <= _HALVINGS and min(levels[-1].shape[-2:]) >= 32:
        levels.append(F.avg_pool2d(levels[-1], 2))
    diameters = 2 * np.sqrt(np.bincount(labels.ravel()) / np.pi)
    return _Decoded(
        [level.round().to(torch.uint8) for level in levels], torch.from_numpy(labels)[None, None].float(), diameters
    )


class LabelledImages:
    """The images of a set that train, or validate. Raises UserError where the set, or a group, has none."""

    def __init__(self, settings: LabelSet):
        self.settings = settings
        _, pairs, groups = paired_files(settings.folder)
        known = set(groups)
        for group in (*(settings.groups or ()), *settings.without):
            if group not in known:
                raise UserError(
                    f"{settings.folder}: no group {group!r} in index.csv; known: {', '.join(sorted(known)) or 'none'}"
                )
        wanted = known if settings.groups is None else set(settings.groups)
        chosen = wanted - set(settings.without)
        self.pairs = [pair for pair, group in zip(pairs, groups, strict=True) if group in chosen]
        if not self.pairs:
            raise UserError(
                f"{settings.folder}: no image is left; expected groups beside {', '.join(settings.without)}"
            )
        for image, label_map in self.pairs:
            require_size_of(label_map, read_size(image))

    def crop(self, rng: np.random.Generator, *, size: int, scale: float) -> Crop:
        """A random square of `size` px, turned, mirrored, stretched and bent, at `scale` times the set's own scale.

        What lies outside of the image is white."""
        decoded = _decode(*self.pairs[rng.integers(len(self.pairs))])
        scale *= self.settings.scale
        level = int(np.clip(np.floor(-np.log2(scale)), 0, len(decoded.pyramid) - 1))
        place = _places(rng, decoded.labels.shape[-2:], size=size, scale=scale)
        rgb = _sample(decoded.pyramid[level].float() - 255, place, mode="bilinear") / 255 + 1
        labels = _sample(decoded.labels, place, mode="nearest")[0, 0].numpy().astype(np.int64)
        return Crop(rgb[0].permute(1, 2, 0).numpy(), labels, decoded.diameters * scale, self.settings.foreground_only)


def _places(rng: np.random.Generator, shape: tuple[int, int], *, size: int, scale: float) -> torch.Tensor:
    """Where the pixels of a crop lie in an image of `shape`, (1, size, size, 2) as `grid_sample` takes it."""
    angle, stretch = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.1, 0.1, 2)) / scale
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * stretch
    turn[0] *= rng.choice([-1, 1])
    axis = np.arange(size) - (size - 1) / 2
    grid = np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1)
    if rng.random() < 0.5:  # elastic: waves of about a quarter of the crop, by up to 3 px
        coarse = torch.from_numpy(rng.normal(0, rng.uniform(0, 3), (1, 2, 6, 6)))
        bent = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
        grid = grid + bent[0].permute(1, 2, 0).numpy()
    reach = np.minimum(np.abs(turn).sum(axis=1) * size / 2, (shape[1] / 2, shape[0] / 2))
    middle = rng.uniform(reach, (shape[1], shape[0]) - reach)
    place = (grid @ turn.T + middle) / (shape[1], shape[0]) * 2 - 1
    return torch.from_numpy(place.astype(np.float32))[None]


def _sample(values: torch.Tensor, place: torch.Tensor, *, mode: str) -> torch.Tensor:
    return F.grid_sample(values, place, mode=mode, padding_mode="zeros", align_corners=False)

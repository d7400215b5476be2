"""Nuclei drawn as discs in H&E, with their label maps."""

import numpy as np

from cellflux_bridge.cellularity import validation
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.images.stain import RUIFROK_HE, from_optical_density


def stained(haematoxylin: np.ndarray, *, eosin: float = 0.3) -> np.ndarray:
    """H&E of a haematoxylin map (H, W) on even eosin, RGB uint8."""
    amounts = np.stack([haematoxylin, np.full(haematoxylin.shape, eosin)], axis=-1)
    return from_optical_density(amounts @ RUIFROK_HE)


def discs(centres, *, radius: int = 8, size: int = 96, darkness: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """An image of round nuclei, and its label map."""
    labels = np.zeros((size, size), np.int32)
    row, column = np.mgrid[:size, :size]
    for number, (y, x) in enumerate(centres, start=1):
        labels[(row - y) ** 2 + (column - x) ** 2 <= radius**2] = number
    return stained(np.where(labels > 0, darkness, 0.05)), labels


def lattice(step: int, *, size: int = 96) -> list[tuple[int, int]]:
    return [(y, x) for y in range(step // 2, size, step) for x in range(step // 2, size, step)]


def require_nuclei_of_phantoms(segment, size: int) -> None:
    """Of phantoms of every severity and stain: their counts and outlines, near the truth."""
    phantoms = [make_phantom(s, size=size, seed=n, stain_seed=50 + n) for n, s in enumerate(np.linspace(0, 1, 8))]
    score = validation.score([validation.compare(p.labels, segment(p.image)) for p in phantoms])
    assert score.count_error_median <= 0.08
    assert score.f1 > 0.9
    assert score.area_correlation > 0.98

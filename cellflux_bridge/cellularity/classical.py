"""Finding nuclei in H&E patches by rules: without a network, and without a scale that must be given.

What the red channel absorbs is haematoxylin, because eosin hardly absorbs red. Absorption (1 - transmission) and not
optical density is thresholded: it saturates, so that pale nuclei count beside dark ones. A first splitting finds how
large the nuclei are; the second splits and sifts in units of that radius. The parameters were chosen on DSB 2018's
tissue images and phantom tissue (docs/cellularity.md).
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from cellflux_bridge.cellularity.parameters import Parameters
from cellflux_bridge.cellularity.splitting import split
from cellflux_bridge.images.stain import RUIFROK_HE, macenko_stains

# Absorption below which nothing is stained: glass, whose noise must not be thresholded.
_LEAST_CONTRAST = 0.06
_LEAST_SHARE = 0.5  # of the contrast by fixed stain vectors, that an image's own must reach to be used
_RADII = (2.0, 40.0)  # px, between which a nuclear radius is sought
_RADII_UM = (1.5, 12.0)  # microns, where microns per pixel are known
_DEFAULT = Parameters()


def haematoxylin(rgb: np.ndarray, stains: str) -> tuple[np.ndarray, np.ndarray]:
    """Absorption in [0, 1] and optical density >= 0 of haematoxylin in the red channel, (H, W) float32 each.

    "red" takes the channel as it is; the others leave out what eosin absorbs of it, by unmixing. Where an image's own
    vectors tell dark from pale pixels less than half as well as the fixed ones, nuclei are not what sets those vectors
    apart (in thick, purple tissue it is pale blue from saturated violet), and the fixed ones are taken.
    """
    red = _DENSITY[rgb[..., 0]]
    if stains == "red":
        return _ABSORPTION[rgb[..., 0]], red
    density = _unmixed(rgb, RUIFROK_HE)
    if stains == "macenko":
        own, dark = _unmixed(rgb, macenko_stains(rgb)), red > red.mean()
        by_own, by_fixed = (of[dark].mean() - of[~dark].mean() if dark.any() else 0 for of in (own, density))
        density = own if by_own >= _LEAST_SHARE * by_fixed else density
    return 1 - np.exp(-density), density


def _unmixed(rgb: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Optical density (H, W) of haematoxylin in the red channel, by stain vectors (2, 3)."""
    # Channel by channel: the threads of a matrix product wait on those of other processes.
    weights = (np.linalg.pinv(vectors)[:, 0] * vectors[0, 0]).astype(np.float32)
    return np.maximum(sum(w * _DENSITY[rgb[..., c]] for c, w in enumerate(weights)), 0)


_ABSORPTION = (1 - np.arange(256) / 255).astype(np.float32)
_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


@dataclass(frozen=True)
class _Ground:
    """A thresholded image: smoothed absorption, nuclear pixels, their distance to the background, and both means."""

    absorption: np.ndarray
    mask: np.ndarray
    distance: np.ndarray
    background: float
    contrast: float


def _threshold(absorption: np.ndarray, sigma: float, share: float) -> _Ground | None:
    """None where nothing stands out."""
    smooth = ndimage.gaussian_filter(absorption, sigma, truncate=3)
    sample = smooth[::2, ::2] if smooth.size > 40_000 else smooth
    if np.ptp(sample) < _LEAST_CONTRAST:
        return None
    otsu = threshold_otsu(sample)
    above = smooth > otsu
    background, nuclear = float(smooth[~above].mean()), float(smooth[above].mean())
    if nuclear - background < _LEAST_CONTRAST:
        return None
    mask = ndimage.binary_fill_holes(smooth > background + share * (otsu - background))
    distance = ndimage.distance_transform_edt(mask).astype(np.float32)
    return _Ground(smooth, mask, distance, background, nuclear - background)


def segment(rgb: np.ndarray, *, mpp: float | None = None, parameters: Parameters = _DEFAULT) -> np.ndarray:
    """The nuclei of an RGB uint8 image (H, W, 3) as a label map (H, W) int32: 0 background, 1..n in no order.

    With `mpp` (microns per pixel) the nuclear radius is sought between 1.5 and 12 microns, and no nucleus is smaller
    than `least_area` of the smallest such disc; without it between 2 and 40 px. Raises NotBrightField for grey, dark
    (fluorescence) and inverted images.
    """
    nothing = np.zeros(rgb.shape[:2], np.int32)
    radii = _RADII if mpp is None else tuple(max(um / mpp, _RADII[0]) for um in _RADII_UM)
    absorption, density = haematoxylin(rgb, parameters.stains)
    ground = _threshold(absorption, parameters.smoothing, parameters.threshold)
    if ground is None:
        return nothing
    stained = density[ground.mask]
    density = density / max(float(stained.mean() - density[~ground.mask].mean()), 0.05)
    # The mean distance to the edge is a third of a disc's radius.
    radius = float(np.clip(parameters.first_scale * 3 * ground.distance[ground.mask].mean(), *radii))
    labels = split(ground.mask, ground.distance, density, radius, parameters)
    areas = np.sort(np.bincount(labels.ravel())[1:])
    if not areas.any():
        return nothing
    middle = areas[np.searchsorted(np.cumsum(areas), parameters.scale_quantile * areas.sum())]
    radius = float(np.clip(parameters.scale * np.sqrt(middle / np.pi), *radii))
    return _sift(split(ground.mask, ground.distance, density, radius, parameters), ground, radius, parameters)


def _sift(labels: np.ndarray, ground: _Ground, radius: float, parameters: Parameters) -> np.ndarray:
    """Nuclei cut back to their own outline, without those that are too small or too pale, numbered 1..n."""
    flat, absorption = labels.ravel(), ground.absorption.ravel()
    pixels = np.bincount(flat)
    mean = np.bincount(flat, absorption) / np.maximum(pixels, 1) - ground.background
    cut = ground.background + parameters.outline * mean
    inside = (absorption > cut[flat]) & (flat > 0)
    pixels = np.bincount(flat[inside], minlength=len(mean))
    keep = pixels >= max(parameters.least_area * np.pi * radius**2, 6)
    keep &= mean > parameters.least_contrast * ground.contrast
    keep[0] = False
    number = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return np.where(inside, number[flat], 0).reshape(labels.shape)

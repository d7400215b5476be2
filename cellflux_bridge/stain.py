"""Optical density, stain vectors, and stain transfer by Macenko and Reinhard.

Images are RGB. Optical density is OD = -ln(I / 255) per channel (Beer-Lambert), so a pixel that holds
concentrations c of stains with unit vectors M (one a row) has OD = c @ M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from skimage.color import lab2rgb, rgb2lab

# Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution" (2001): rows are the
# unit optical-density vectors of haematoxylin and eosin.
RUIFROK_HE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
RUIFROK_HE /= np.linalg.norm(RUIFROK_HE, axis=1, keepdims=True)

# An image whose 95th percentile of mean density lies below this shows glass.
_BLANK_DENSITY = 0.1


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Optical density of an RGB image in [0, 255], any shape (..., 3), as float32 >= 0."""
    return -np.log(np.maximum(np.asarray(rgb, dtype=np.float32), 1.0) / 255.0)


def from_optical_density(density: np.ndarray) -> np.ndarray:
    """RGB uint8 of an optical density (..., 3): the inverse of `optical_density`."""
    return np.clip(np.rint(255.0 * np.exp(-density)), 0, 255).astype(np.uint8)


def concentrations(rgb: np.ndarray, stains: np.ndarray = RUIFROK_HE) -> np.ndarray:
    """Stain concentrations (..., num_stains) of an RGB image, least squares onto unit `stains` (num_stains, 3)."""
    return optical_density(rgb) @ np.linalg.pinv(stains).astype(np.float32)


@dataclass(frozen=True)
class StainReference:
    """What stain normalisation maps every image toward; numbers only, so that it travels in a checkpoint.

    `method` is "reinhard" (values: six numbers, mean and standard deviation of CIELAB L, a, b) or "macenko"
    (values: eight numbers, two unit stain vectors and the 99th percentile of either concentration).
    """

    method: str
    values: tuple[float, ...]


def _lab_statistics(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lab = rgb2lab(rgb).reshape(-1, 3)
    return lab.mean(axis=0), lab.std(axis=0)


def macenko_stains(rgb: np.ndarray, *, min_density: float = 0.15, percentile: float = 1.0) -> np.ndarray:
    """Haematoxylin and eosin unit vectors (2, 3) of one RGB uint8 image, estimated from its own pixels.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis" (ISBI 2009): the plane of
    the two leading singular vectors of the optical density, and the extreme angles in it. An image with too little
    stain to tell (under 32 pixels above `min_density`, the mean over channels) gets the Ruifrok vectors.
    """
    density = optical_density(rgb).reshape(-1, 3)
    # Not every channel: pale eosin hardly absorbs red, and its pixels show which way its vector points.
    density = density[density.mean(axis=1) > min_density]
    if len(density) < 32:
        return RUIFROK_HE.copy()
    _, vectors = np.linalg.eigh(np.cov(density.T))
    plane = vectors[:, [2, 1]]
    plane *= np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    angles = np.arctan2(*(density @ plane).T[::-1])
    extremes = np.percentile(angles, [percentile, 100 - percentile])
    stains = np.abs(np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    # Haematoxylin absorbs red far more strongly than eosin does.
    return stains if stains[0, 0] >= stains[1, 0] else stains[::-1].copy()


def fit_reference(method: str, images: Sequence[np.ndarray]) -> StainReference:
    """The reference of a set of RGB uint8 images: the mean over images of what `method` measures on each."""
    if method == "reinhard":
        measured = [np.concatenate(_lab_statistics(image)) for image in images]
    elif method == "macenko":
        measured = []
        for image in images:
            stains = macenko_stains(image)
            strength = np.percentile(concentrations(image, stains).reshape(-1, 2), 99, axis=0)
            measured.append(np.concatenate([stains.ravel(), strength]))
    else:
        raise ValueError(f"stain method {method!r}: expected 'reinhard' or 'macenko'")
    return StainReference(method, tuple(float(v) for v in np.mean(measured, axis=0)))


def _is_blank(rgb: np.ndarray) -> bool:
    """Whether hardly anything is stained: normalising glass would make tissue of its noise."""
    return bool(np.percentile(optical_density(rgb).mean(axis=-1), 95) < _BLANK_DENSITY)


def normalise(rgb: np.ndarray, reference: StainReference) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) with the stain of `reference`.

    Reinhard: CIELAB mean and spread matched channel by channel (Reinhard et al., "Color transfer between images",
    2001). Macenko: concentrations in the image's own stain vectors, rescaled to the reference's 99th percentile and
    mixed again with the reference's vectors. An image that shows glass and no tissue is returned as it is.
    """
    values = np.asarray(reference.values)
    if _is_blank(rgb):
        return rgb
    if reference.method == "reinhard":
        mean, std = _lab_statistics(rgb)
        lab = (rgb2lab(rgb) - mean) / np.maximum(std, 1e-6) * values[3:] + values[:3]
        return np.clip(np.rint(lab2rgb(lab) * 255.0), 0, 255).astype(np.uint8)
    stains = macenko_stains(rgb)
    amounts = np.maximum(concentrations(rgb, stains), 0.0)
    strength = np.maximum(np.percentile(amounts.reshape(-1, 2), 99, axis=0), 1e-3)
    target = values[:6].reshape(2, 3)
    target = target / np.linalg.norm(target, axis=1, keepdims=True)
    return from_optical_density(amounts / strength * values[6:] @ target)


def augment(images: torch.Tensor, *, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Stain jitter in optical density (Tellez et al. 2018): every stain's concentration scaled and shifted.

    `images`: (N, ..., 3, H, W) float in [-1, 1]; the leading index is what shares one draw, so a (source, target)
    pair stacked to (N, 2, 3, H, W) keeps the stain difference that the flow has to learn. Scale is uniform in
    1 +- strength, shift uniform in +- strength / 4 (natural-log density). Returns the same shape and range.
    """
    stains = torch.tensor(RUIFROK_HE, dtype=images.dtype)
    residual = torch.linalg.cross(stains[0], stains[1])
    basis = torch.cat([stains, residual[None] / residual.norm()])
    draws = torch.rand(len(images), 2, 2, generator=generator, dtype=images.dtype) * 2 - 1
    scale, shift = torch.ones(len(images), 3), torch.zeros(len(images), 3)
    scale[:, :2] += strength * draws[:, 0]
    shift[:, :2] = strength / 4 * draws[:, 1]
    # OD' = ((OD B^-1) * scale + shift) B, written as one 3x3 matrix and an offset for each draw.
    matrix = torch.linalg.inv(basis) @ (scale[:, :, None] * basis)
    offset = shift @ basis
    density = -torch.log(((images + 1) / 2).clamp(1 / 255, 1))
    density = torch.einsum("n...chw,ncd->n...dhw", density, matrix.to(density))
    density = density + offset.to(density).view(len(images), *[1] * (images.dim() - 4), 3, 1, 1)
    return torch.exp(-density).clamp(0, 1) * 2 - 1

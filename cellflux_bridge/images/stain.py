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
# Two stains of one image differ by more degrees, and its density varies by a larger share of its mean.
_LEAST_ANGLE, _LEAST_VARIATION = 10.0, 0.1
# The factor by which normalising may strengthen a stain; between whole tiles of one data set they stay under it.
_MOST_GAIN = 4.0


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


def two_stains(rgb: np.ndarray, *, min_density: float = 0.15, percentile: float = 1.0) -> np.ndarray | None:
    """Haematoxylin and eosin unit vectors (2, 3) of one RGB uint8 image, estimated from its own pixels.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis" (ISBI 2009): the plane of
    the two leading singular vectors of the optical density, and the extreme angles in it. None where the image does
    not show both stains: fewer than 32 pixels above `min_density` (the mean over channels), an even density, or two
    vectors that are one stain and its noise. Unmixing by those would share the one stain out between both.
    """
    density = optical_density(rgb).reshape(-1, 3)
    # Not every channel: pale eosin hardly absorbs red, and its pixels show which way its vector points.
    density = density[density.mean(axis=1) > min_density]
    if len(density) < 32:
        return None
    variances, vectors = np.linalg.eigh(np.cov(density.T))
    if variances[2] < (_LEAST_VARIATION * np.linalg.norm(density.mean(axis=0))) ** 2:
        return None
    plane = vectors[:, [2, 1]]
    plane *= np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    angles = np.arctan2(*(density @ plane).T[::-1])
    extremes = np.percentile(angles, [percentile, 100 - percentile])
    stains = np.abs(np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    # Haematoxylin absorbs red far more strongly than eosin does.
    stains = stains if stains[0, 0] >= stains[1, 0] else stains[::-1].copy()
    (own, to_eosin), (to_haematoxylin, _) = stains @ RUIFROK_HE.T
    # Real eosin, with nuclei's blue about it, may lie nearer to the published haematoxylin than to the published eosin.
    alike = np.cos(np.radians(_LEAST_ANGLE))
    is_one = stains[0] @ stains[1] > alike or to_eosin > own or to_haematoxylin > alike
    return None if is_one else stains


def macenko_stains(rgb: np.ndarray) -> np.ndarray:
    """The vectors (2, 3) of `two_stains`, or those of Ruifrok where an image does not show both stains."""
    found = two_stains(rgb)
    return RUIFROK_HE.copy() if found is None else found


def _strengths(amounts: np.ndarray) -> np.ndarray:
    """The robust maximum of either stain's concentration, (2,)."""
    return np.percentile(amounts.reshape(-1, 2), 99, axis=0)


def fit_reference(method: str, images: Sequence[np.ndarray]) -> StainReference:
    """The reference of a set of RGB uint8 images: the mean over images of what `method` measures on each.

    Macenko's is of the images that show both stains, or, where none does, of all by Ruifrok's vectors.
    """
    if method == "reinhard":
        measured = [np.concatenate(_lab_statistics(image)) for image in images]
    elif method == "macenko":
        found = [(image, two_stains(image)) for image in images]
        found = [pair for pair in found if pair[1] is not None] or [(image, RUIFROK_HE) for image in images]
        measured = [np.concatenate([s.ravel(), _strengths(concentrations(image, s))]) for image, s in found]
    else:
        raise ValueError(f"stain method {method!r}: expected 'reinhard' or 'macenko'")
    return StainReference(method, tuple(float(v) for v in np.mean(measured, axis=0)))


def _is_blank(rgb: np.ndarray) -> bool:
    """Whether hardly anything is stained: normalising glass would make tissue of its noise."""
    return bool(np.percentile(optical_density(rgb).mean(axis=-1), 95) < _BLANK_DENSITY)


def normalise(rgb: np.ndarray, reference: StainReference) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) with the stain of `reference`.

    Reinhard: CIELAB mean and spread matched channel by channel (Reinhard et al., "Color transfer between images",
    2001). Macenko: concentrations in the image's own stain vectors, rescaled to the reference's 99th percentile (by at
    most 4, lest noise become a stain) and mixed again with the reference's vectors. An image that does not show both
    stains (see `two_stains`) is unmixed by the reference's vectors, too, and not rescaled: it stays what it is. So does
    an image that shows glass and no tissue, to the pixel.
    """
    values = np.asarray(reference.values)
    if _is_blank(rgb):
        return rgb
    if reference.method == "reinhard":
        mean, std = _lab_statistics(rgb)
        lab = (rgb2lab(rgb) - mean) / np.maximum(std, 1e-6) * values[3:] + values[:3]
        return np.clip(np.rint(lab2rgb(lab) * 255.0), 0, 255).astype(np.uint8)
    target = values[:6].reshape(2, 3)
    target = target / np.linalg.norm(target, axis=1, keepdims=True)
    stains = two_stains(rgb)
    if stains is None:
        return from_optical_density(np.maximum(concentrations(rgb, target), 0.0) @ target)
    amounts = np.maximum(concentrations(rgb, stains), 0.0)
    strength = np.maximum(_strengths(amounts), np.float32(values[6:] / _MOST_GAIN))
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

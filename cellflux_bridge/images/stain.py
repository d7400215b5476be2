"""Optical density, which pixels are tissue, stain vectors, and stain transfer by Macenko and Reinhard.

Images are RGB (a UserError says so of others) and show haematoxylin and eosin. Optical density is OD = -ln(I / 255) per
channel (Beer-Lambert), so a pixel that holds concentrations c of stains with unit vectors M (one a row) has OD = c @ M.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.color import lab2rgb, rgb2lab

from cellflux_bridge.base.errors import UserError

# Normalised colours may lie outside of RGB; they are clipped.
warnings.filterwarnings("ignore", message="Conversion from CIE-LAB")

# Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution" (2001): rows are the
# unit optical-density vectors of haematoxylin and eosin.
RUIFROK_HE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
RUIFROK_HE /= np.linalg.norm(RUIFROK_HE, axis=1, keepdims=True)

# A pixel whose mean density lies below this is glass.
_GLASS = 0.1
# Densities within this width about a rule's limit are tissue in part, so that no seam shows where tissue ends.
_SOFT = 0.05
# Parts of fewer pixels than this, and than 1 % of an image, belong to what is around them, unless the mean of 5 x 5
# pixels breaks a rule by a density that dark nuclei hardly reach.
_SPECK, _CERTAIN = 64, 0.1
# Pixels this near to an artefact hold some of its colour (blur, JPEG), and are left out of statistics.
_FRINGE = 6
# An image shows tissue if at least this share of its pixels does.
_LEAST_TISSUE = 0.01
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


def tissue_mask(rgb: np.ndarray) -> np.ndarray:
    """Which pixels of an RGB uint8 image (H, W, 3) are tissue stained with haematoxylin and eosin: (H, W) bool.

    Both stains absorb green most, haematoxylin red nearly as much, and eosin little else. In optical density tissue has

    - a mean above 0.1 (below it is glass);
    - green >= 1.08 of the mean of red and blue (black, grey, scan borders and dark glass have less);
    - green >= 0.85 red (blue and green pen have less) and >= 0.8 blue (brown and yellow have less);
    - blue >= 0.3 (red - 1), or green >= 1.12 red as in nuclei of bluish scans (dark blue pen has less);
    - blue <= 0.75 green where eosin alone is strong, green > 1.2 and red < 0.35 green (red pen has more).

    Channels below a tenth of white count as a tenth: black has no hue. Noisy artefacts are judged by the mean of 5 x 5
    pixels, too; small parts of tissue, such as the grey of a dark nucleus, and small holes in artefacts belong to what
    is around them. Navy, purple, pink and crimson pen pass for tissue. In each of five public data sets at least 99 %
    of the pixels above a density of 0.8 are kept.
    """
    return _tissue_weight(rgb) >= 0.5


def _tissue_weight(rgb: np.ndarray) -> np.ndarray:
    """How far pixels (H, W) are tissue, from 0 to 1 (see `tissue_mask`)."""
    if rgb.ndim != 3 or rgb.shape[-1] != 3:
        raise UserError(f"stain: RGB images only (height, width, 3), found {rgb.shape}; set data.stain.mode=none")
    rgb = rgb.astype(np.float32)
    margin = _hue_margin(rgb)
    around = _hue_margin(ndimage.uniform_filter(rgb, (5, 5, 0)))
    stained = np.clip((optical_density(rgb).mean(axis=-1) - _GLASS) / _SOFT + 0.5, 0, 1)
    foreign = (margin < 0) & (stained >= 0.5)
    least = min(_SPECK, margin.size // 100)
    core = (around < -_CERTAIN) & (stained >= 0.5)
    artefact = core | _large_parts(foreign, least, core=core)
    artefact = ~_large_parts(~artefact, least)
    hue = np.where(foreign, 1, np.clip(margin / _SOFT + 0.5, 0, 1))
    return np.where(artefact, 0, np.minimum(hue, stained))


def _hue_margin(rgb: np.ndarray) -> np.ndarray:
    """By how much of optical density pixels (H, W) keep all rules of `tissue_mask` on hue; negative outside."""
    red, green, blue = np.moveaxis(optical_density(np.maximum(rgb, 25)), -1, 0)
    rules = (
        green - 1.08 * (red + blue) / 2,
        green - 0.85 * red,
        green - 0.8 * blue,
        np.maximum(blue - 0.3 * (red - 1), green - 1.12 * red),
        np.maximum.reduce([0.75 * green - blue, red - 0.35 * green, 1.2 - green]),
    )
    return np.minimum.reduce(rules)


def _large_parts(mask: np.ndarray, least: int, *, core: np.ndarray | bool = False) -> np.ndarray:
    """A mask (H, W) without its connected parts of fewer than `least` pixels that hold no pixel of `core`."""
    parts, _ = ndimage.label(mask)
    kept = np.bincount(parts.ravel()) >= least
    kept[np.unique(parts[mask & core])] = True
    return mask & kept[parts]


def _tissue_pixels(rgb: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The pixels (N, 1, 3) whose statistics are an image's stain: tissue, less what lies near to an artefact if that
    leaves half of it; none of an image that hardly shows tissue."""
    tissue = weight >= 0.5
    if tissue.mean() < _LEAST_TISSUE:
        return rgb[:0, :1]
    artefact = ~tissue & (optical_density(rgb).mean(axis=-1) > _GLASS)
    inner = tissue & (ndimage.distance_transform_edt(~artefact) > _FRINGE) if artefact.any() else tissue
    return rgb[inner if 2 * inner.sum() >= tissue.sum() else tissue][:, None]


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


def _lab_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lab = rgb2lab(pixels).reshape(-1, 3)
    return lab.mean(axis=0), lab.std(axis=0)


def two_stains(rgb: np.ndarray) -> np.ndarray | None:
    """Haematoxylin and eosin unit vectors (2, 3) of one RGB uint8 image, estimated from its own tissue.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis" (ISBI 2009): the plane of
    the two leading singular vectors of the optical density, and the extreme angles in it. None where the image does
    not show both stains: fewer than 32 pixels of a mean density above 0.15, an even density, or two vectors that are
    one stain and its noise. Unmixing by those would share the one stain out between both.
    """
    return _two_stains(_tissue_pixels(rgb, _tissue_weight(rgb)))


def _two_stains(pixels: np.ndarray) -> np.ndarray | None:
    density = optical_density(pixels).reshape(-1, 3)
    # Not every channel: pale eosin hardly absorbs red, and its pixels show which way its vector points.
    density = density[density.mean(axis=1) > 0.15]
    if len(density) < 32:
        return None
    variances, vectors = np.linalg.eigh(np.cov(density.T))
    if variances[2] < (_LEAST_VARIATION * np.linalg.norm(density.mean(axis=0))) ** 2:
        return None
    plane = vectors[:, [2, 1]]
    plane *= np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    angles = np.arctan2(*(density @ plane).T[::-1])
    extremes = np.percentile(angles, [1, 99])
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


def _strengths(pixels: np.ndarray, stains: np.ndarray) -> np.ndarray:
    """The robust maximum of either stain's concentration, (2,)."""
    return np.percentile(concentrations(pixels, stains).reshape(-1, 2), 99, axis=0)


def fit_reference(method: str, images: Sequence[np.ndarray]) -> StainReference:
    """The reference of a set of RGB uint8 images: the mean over images of what `method` measures on the tissue of each.

    Images count by the share of them that is tissue, those without tissue not at all. Macenko's is of the images that
    show both stains, or, where none does, of all by Ruifrok's vectors. Raises UserError where no image shows tissue.
    """
    if method not in ("reinhard", "macenko"):
        raise ValueError(f"stain method {method!r}: expected 'reinhard' or 'macenko'")
    weights = ((image, _tissue_weight(image)) for image in images)
    tissue = [(pixels, weight.mean()) for image, weight in weights if len(pixels := _tissue_pixels(image, weight))]
    if not tissue:
        raise UserError("stain: no image shows tissue in haematoxylin and eosin; set data.stain.mode=none")
    if method == "reinhard":
        measured = [(np.concatenate(_lab_statistics(pixels)), share) for pixels, share in tissue]
    else:
        found = [(pixels, share, _two_stains(pixels)) for pixels, share in tissue]
        both = [one for one in found if one[2] is not None] or [(*one[:2], RUIFROK_HE) for one in found]
        measured = [
            (np.concatenate([vectors.ravel(), _strengths(pixels, vectors)]), share) for pixels, share, vectors in both
        ]
    values, shares = zip(*measured, strict=True)
    return StainReference(method, tuple(np.average(values, axis=0, weights=shares).tolist()))


def normalise(rgb: np.ndarray, reference: StainReference) -> np.ndarray:
    """An RGB uint8 image (H, W, 3) with the stain of `reference` in its tissue.

    Reinhard: CIELAB mean and spread matched channel by channel (Reinhard et al., "Color transfer between images",
    2001). Macenko: concentrations in the image's own stain vectors, rescaled to the reference's 99th percentile (by at
    most 4, lest noise become a stain) and mixed again with the reference's vectors. An image that does not show both
    stains (see `two_stains`) is unmixed by the reference's vectors, too, and not rescaled: it stays what it is.

    Statistics are of tissue alone (`tissue_mask`). Glass, pen, borders and an image without tissue stay as they are, to
    the pixel; on the way from tissue to glass old and new are mixed.
    """
    weight = _tissue_weight(rgb)
    pixels = _tissue_pixels(rgb, weight)
    if not len(pixels):
        return rgb
    changed = weight > 0
    old = rgb[changed][:, None]
    values = np.asarray(reference.values)
    if reference.method == "reinhard":
        mean, std = _lab_statistics(pixels)
        lab = (rgb2lab(old) - mean) / np.maximum(std, 1e-6) * values[3:] + values[:3]
        new = lab2rgb(lab) * 255.0
    else:
        target = values[:6].reshape(2, 3)
        target = target / np.linalg.norm(target, axis=1, keepdims=True)
        stains = _two_stains(pixels)
        factor = 1.0
        if stains is not None:
            factor = values[6:] / np.maximum(_strengths(pixels, stains), values[6:] / _MOST_GAIN)
        amounts = np.maximum(concentrations(old, target if stains is None else stains), 0.0)
        new = 255.0 * np.exp(-(amounts * factor) @ target)
    share = weight[changed][:, None, None]
    out = rgb.copy()
    out[changed] = np.clip(np.rint(share * new + (1 - share) * old), 0, 255).astype(np.uint8)[:, 0]
    return out


def draw_jitter(num: int, *, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Stain jitter in optical density (Tellez et al. 2018): every stain's concentration scaled and shifted.

    Returns (num, 4, 3) float32 for `jitter`: of each draw the map of density, a 3x3 matrix and an offset. Scale is
    uniform in 1 +- strength, shift uniform in +- strength / 4 (natural-log density).
    """
    stains = torch.tensor(RUIFROK_HE, dtype=torch.float32)
    residual = torch.linalg.cross(stains[0], stains[1])
    basis = torch.cat([stains, residual[None] / residual.norm()])
    draws = torch.rand(num, 2, 2, generator=generator) * 2 - 1
    scale, shift = torch.ones(num, 3), torch.zeros(num, 3)
    scale[:, :2] += strength * draws[:, 0]
    shift[:, :2] = strength / 4 * draws[:, 1]
    # OD' = ((OD B^-1) * scale + shift) B, written as one 3x3 matrix and an offset for each draw.
    matrix = torch.linalg.inv(basis) @ (scale[:, :, None] * basis)
    return torch.cat([matrix, (shift @ basis)[:, None]], dim=1)


def jitter(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Images (N, ..., 3, H, W) float in [-1, 1] with the jitter (N, 4, 3) that `draw_jitter` drew, in the same range.

    The leading index is what shares one draw, so a (source, target) pair stacked to (N, 2, 3, H, W) keeps the stain
    difference that the flow has to learn.
    """
    density = -torch.log(((images + 1) / 2).clamp(1 / 255, 1))
    density = torch.einsum("n...chw,ncd->n...dhw", density, drawn[:, :3])
    density = density + drawn[:, 3].view(len(images), *[1] * (images.dim() - 4), 3, 1, 1)
    return torch.exp(-density).clamp(0, 1) * 2 - 1


def augment(images: torch.Tensor, *, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Images (N, ..., 3, H, W) float in [-1, 1] with a stain jitter drawn for each: see `draw_jitter` and `jitter`."""
    return jitter(images, draw_jitter(len(images), strength=strength, generator=generator).to(images))

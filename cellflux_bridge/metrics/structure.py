"""Figures of pixels and layers: stain and texture of patches, and how much of a source's structure a frame keeps.

Images are uint8 RGB; sequences are (N, L, 3, H, W).
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale_ssim

from cellflux_bridge.images.stain import StainReference, concentrations, normalise
from cellflux_bridge.metrics.bands import grey

TISSUE = ("haematoxylin_area", "contrast", "fine_outlines")
# Concentrations, in natural units of optical density, from which a pixel counts as haematoxylin's, and as black.
_STAINED, _DARKEST = 1.0, 2.0
# Weights of the scales, finest first (Wang, Simoncelli & Bovik 2003), and the side of the window.
_SCALE_WEIGHTS, _WINDOW = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 11
_CHUNK = 64


def tissue_figures(patches: np.ndarray) -> np.ndarray:
    """(N, 3), as named in `TISSUE`, of RGB uint8 patches (N, 3, H, W).

    haematoxylin_area  share of pixels with a haematoxylin concentration above 1.0 (fixed vectors of Ruifrok & Johnston)
    contrast           standard deviation over the pixels of values in [0, 1], mean over the channels
    fine_outlines      1 - E|b| / sqrt(2 E[b^2] / pi) of b, the grey image without its blur of 1 px: 0 for Gaussian
                       noise of any strength, higher where detail stands together in outlines
    """
    values = patches.astype(np.float32)
    haematoxylin = concentrations(patches.transpose(0, 2, 3, 1))[..., 0]
    area = (haematoxylin > _STAINED).mean((1, 2))
    contrast = values.std((2, 3)).mean(1) / 255
    finest = grey(patches)[:, 0]
    finest -= gaussian_filter(finest, (0, 1, 1))
    spread = np.sqrt(2 / np.pi * (finest**2).mean((1, 2)))
    outlines = 1 - np.abs(finest).mean((1, 2)) / np.maximum(spread, 1e-6)
    return np.stack([area, contrast, np.where(spread > 0, outlines, 0)], axis=1)


def num_scales(size: int) -> int:
    """The number of the five scales for which images of a side have room; 0 below the window's 11 pixels."""
    # The second bound is torchmetrics' own.
    return sum(min(size // 2**scale, size // max(1, scale) ** 2) >= _WINDOW for scale in range(len(_SCALE_WEIGHTS)))


def haematoxylin_ms_ssim(frames: np.ndarray) -> np.ndarray:
    """MS-SSIM of every frame's haematoxylin to the first one's, (N, L) in [0, 1]; NaN under 11 px.

    Concentrations are those of fixed stain vectors, clipped at 2. Small images have fewer than five scales (32 px two,
    64 px three), whose weights are made to sum to 1: values of different sizes do not compare.
    """
    num, length, _, *size = frames.shape
    scales = num_scales(min(size))
    if scales == 0:
        return np.full((num, length), np.nan)
    weights = np.array(_SCALE_WEIGHTS[:scales]) / sum(_SCALE_WEIGHTS[:scales])
    result = np.empty((num, length), np.float32)
    for n, sequence in enumerate(frames):
        stained = concentrations(sequence.transpose(0, 2, 3, 1))[..., 0]
        x = torch.from_numpy(np.clip(stained / _DARKEST, 0, 1))[:, None].float()
        # A negative contrast term has no root: it counts as no similarity.
        options = {"data_range": 1.0, "betas": tuple(weights.tolist()), "normalize": "relu", "reduction": "none"}
        result[n] = multiscale_ssim(x, x[:1].expand_as(x), **options).numpy()
    return result


def layer_distance(frames: np.ndarray, maps: Callable[[torch.Tensor], list[torch.Tensor]]) -> np.ndarray:
    """Distance of every frame to the first one over the layers of a network, (N, L) >= 0.

    `maps` gives, of a batch (B, 3, H, W), feature maps (B, C, h, w) of every layer. As LPIPS without its learned
    weights (Zhang et al. 2018, eq. 1): features of unit length at every place, squared distances averaged over places
    and over layers.
    """
    num, length = frames.shape[:2]
    step, parts = max(1, _CHUNK // length), []
    for start in range(0, num, step):
        chunk = torch.from_numpy(np.ascontiguousarray(frames[start : start + step]))
        total, layers = 0.0, maps(chunk.flatten(0, 1))
        for layer in layers:
            unit = F.normalize(layer, dim=1, eps=1e-8).unflatten(0, (len(chunk), length))
            total = total + (unit - unit[:, :1]).square().sum(2).mean((2, 3))
        parts.append((total / len(layers)).numpy())
    return np.concatenate(parts)


def with_networks(structure: np.ndarray, network) -> list[tuple[str, np.ndarray, object]]:
    """(figure, values (N, L), the network that they are by) of structure (N, L, 2); MS-SSIM is by none."""
    return [("ms_ssim", structure[..., 0], None), ("layer_distance", structure[..., 1], network)]


def recolour(patches: np.ndarray, reference: StainReference) -> np.ndarray:
    """Patches (N, 3, H, W) with the stain of `reference`: a change of colour alone."""
    return np.stack([normalise(patch, reference) for patch in patches.transpose(0, 2, 3, 1)]).transpose(0, 3, 1, 2)


def stain_share(features: np.ndarray, recoloured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared feature change from the first frame on (N, K), and the part of it (N, K) that a stain transfer explains.

    `features` (N, K+1, D) are of sequences, `recoloured` (N, D) of their first frames after the transfer. A transfer
    may be done in part: the part of it (0 to 1) that explains most is taken.
    """
    change = (features[:, 1:] - features[:, :1]).astype(np.float64)
    stain = recoloured.astype(np.float64) - features[:, 0]
    length = np.maximum((stain**2).sum(1), 1e-24)[:, None]
    part = np.clip(np.einsum("nkd,nd->nk", change, stain) / length, 0, 1)
    whole = (change**2).sum(2)
    return whole, whole - ((change - part[:, :, None] * stain[:, None]) ** 2).sum(2)

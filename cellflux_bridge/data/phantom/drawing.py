"""Phantom tissue: drawn H&E patches whose architecture moves with a severity, and the nuclei they show.

`tissue` places glands and cells; here they reach the pixel grid, are stained and exposed. The stain has a
random stream of its own, so that it is independent of severity.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.phantom.tissue import NUCLEUS, Tissue, place_tissue, relative_outline, smooth_noise
from cellflux_bridge.images.stain import RUIFROK_HE, from_optical_density

MIN_SIZE = 16
MIN_VISIBLE, MIN_PIXELS = 0.3, 6  # share of its outline, and px, that a nucleus must show to be kept
HALO = 1.5  # relative radius out to which a nucleus is painted, for its soft edge
EOSIN_WARMTH = np.array([[0, 0, 0], [0.05, 0, 0.2]])  # pink: Ruifrok's vector alone is magenta


@dataclass(frozen=True)
class Phantom:
    """One drawn patch and the nuclei that are visible in it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    labels: np.ndarray  # (H, W) uint16: 0 background, i + 1 the visible pixels of nucleus i
    centres: np.ndarray  # (n, 2) float32, px: row and column of the centroid of those pixels
    areas: np.ndarray  # (n,) int64, px: how many they are
    severity: float


@dataclass(frozen=True)
class _Raster:
    """The visible cells, and maps (size, size) of where they lie."""

    cells: np.ndarray  # (n,) NUCLEUS
    labels: np.ndarray
    cover: np.ndarray  # the label, continued over the halo just outside an outline
    depth: np.ndarray  # radius relative to the outline of the covering nucleus, at most HALO
    nucleolus: np.ndarray  # haematoxylin concentration that nucleoli add


def nucleus_diameter_for(size: int) -> float:
    """Nuclear diameter in px of a patch of `size` px: 6.0 at 32, 7.4 at 64, 11.2 at 256.

    It grows more slowly than the patch, so that a larger patch also shows more tissue.
    """
    return 6.0 * (size / 32) ** 0.3


def make_phantom(
    severity: float,
    *,
    size: int,
    seed: int,
    stain_seed: int | None = None,
    nucleus_diameter: float | None = None,
) -> Phantom:
    """A drawn H&E patch, from ordered glands in loose stroma at severity 0 to crowded, fused atypia at 1.

    `size`: px of either side, at least 16. `seed` >= 0 decides the tissue and, unless `stain_seed` is given,
    the stain, which severity never moves. `nucleus_diameter`: px, about the mean at severity 0.5; by default
    `nucleus_diameter_for(size)`.
    """
    if not 0.0 <= severity <= 1.0:
        raise UserError(f"severity {severity}: expected a number in [0, 1]")
    if size < MIN_SIZE:
        raise UserError(f"size {size}: expected at least {MIN_SIZE} px")
    diameter = nucleus_diameter_for(size) if nucleus_diameter is None else nucleus_diameter
    if not 3.0 <= diameter <= size:
        raise UserError(f"nucleus_diameter {nucleus_diameter}: expected 3 px to the size, {size} px")
    rng = np.random.default_rng([seed, 0])
    tissue, cells = place_tissue(rng, severity, size / diameter)
    raster = _rasterise(cells, size=size, diameter=diameter)
    amounts = _tissue_amounts(rng, severity, tissue, size, diameter)
    amounts = _paint_nuclei(rng, severity, amounts, raster, diameter)
    image = _expose(rng, amounts, np.random.default_rng([seed if stain_seed is None else stain_seed, 1]))
    labels = raster.labels.ravel()
    areas, *sums = (
        np.bincount(labels, weights, minlength=len(raster.cells) + 1)[1:]
        for weights in (None, *np.indices((size, size)).reshape(2, -1))
    )
    centres = (np.stack(sums, axis=1) / areas[:, None]).astype(np.float32)
    return Phantom(image, raster.labels.astype(np.uint16), centres, areas, float(severity))


def _rasterise(cells: np.ndarray, *, size: int, diameter: float) -> _Raster:
    """The cells on the pixel grid, less those that show under `MIN_VISIBLE` of their outline."""
    reach = int(np.ceil(1.25 * diameter * cells["half_length"].max(initial=0.5))) + 1
    window = np.arange(-reach, reach + 1)
    middle = cells["position"] * diameter - (0.5 + 0.5j)
    column, row = np.rint(middle.real).astype(int), np.rint(middle.imag).astype(int)
    within = (middle - column - 1j * row).astype(np.complex64)
    delta = (window + 1j * window[:, None]).astype(np.complex64) - within[:, None, None]
    delta /= np.float32(diameter)
    wide = cells[:, None, None]
    turned = delta * wide["axis"].conj()
    ellipse = turned.real / wide["half_length"] + 1j * (turned.imag / wide["half_width"])
    radius = np.abs(ellipse) + np.float32(1e-6)
    radius = radius / relative_outline(wide["outline"], ellipse / radius)
    nominal = np.count_nonzero(radius < 1, axis=(1, 2))
    at_column, at_row = column[:, None, None] + window, row[:, None, None] + window[:, None]
    inside = (radius < HALO) & (at_column >= 0) & (at_column < size) & (at_row >= 0) & (at_row < size)
    owner, pixel, radius = np.nonzero(inside)[0], (at_row * size + at_column)[inside], radius[inside]
    spot = np.abs(delta[inside] - cells["nucleolus"][owner]) / (0.17 * cells["half_width"][owner] + 0.05)
    while True:
        depth = np.full(size * size, HALO, dtype=np.float32)
        np.minimum.at(depth, pixel, radius)
        front = radius == depth[pixel]
        cover = np.zeros(size * size, dtype=np.intp)
        cover[pixel[front]] = owner[front] + 1
        labels = np.where(depth < 1, cover, 0)
        visible = np.bincount(labels, minlength=len(cells) + 1)[1:]
        keep = visible >= np.maximum(MIN_VISIBLE * nominal, MIN_PIXELS)
        if keep.all():
            break
        left = keep[owner]
        owner, pixel, radius, spot = (np.cumsum(keep) - 1)[owner[left]], pixel[left], radius[left], spot[left]
        cells, nominal = cells[keep], nominal[keep]
    nucleolus = np.zeros(size * size, dtype=np.float32)
    nucleolus[pixel[front]] = (cells["nucleolus_darkness"][owner] * np.exp(-(spot**2)))[front]
    return _Raster(cells, *(plane.reshape(size, size) for plane in (labels, cover, depth, nucleolus)))


def _tissue_amounts(
    rng: np.random.Generator, severity: float, tissue: Tissue, size: int, diameter: float
) -> np.ndarray:
    """Haematoxylin and eosin concentrations (2, size, size) of all but the nuclei."""
    gland, lumen, fibre, mottle, loose = tissue.lifted(size, diameter)
    (grain,) = smooth_noise(rng, 1, size, 0.1 * diameter)
    strand = np.interp(fibre, np.arange(-12, 12, 0.11), rng.standard_normal(219)).astype(np.float32)
    # Loose stroma is torn by pale clefts along its fibres; dense stroma has few.
    cleft = 1 / (1 + np.exp(4 * (0.9 + 0.8 * severity - 0.6 * loose - 0.6 * strand)))
    membrane = 0.15 * (1 - severity) * np.exp(-(((gland - 0.1) / 0.12) ** 2))
    stroma = (0.5 + 0.1 * severity) * (1 + 0.2 * strand + 0.08 * grain) * (1 - 0.85 * cleft) + membrane
    brush_border = 0.25 * np.exp(-((lumen / 0.14) ** 2))
    cytoplasm = 0.42 * (1 + 0.1 * mottle + 0.1 * grain) + brush_border
    epithelium = np.clip(0.5 - gland * diameter, 0, 1)
    eosin = epithelium * cytoplasm + (1 - epithelium) * stroma
    haematoxylin = epithelium * (0.2 + 0.04 * mottle) + (1 - epithelium) * 0.06 * (1 - cleft)
    return np.clip(0.5 + lumen * diameter, 0, 1) * np.stack([haematoxylin, eosin])


def _paint_nuclei(
    rng: np.random.Generator, severity: float, amounts: np.ndarray, raster: _Raster, diameter: float
) -> np.ndarray:
    """The concentrations `amounts` (2, size, size) with nuclei in them, blurred as a microscope would."""
    (clumps,) = smooth_noise(rng, 1, len(raster.labels), 0.1 * diameter)
    cells = np.concatenate([np.zeros(1, NUCLEUS), raster.cells])
    span = np.sqrt(cells["half_length"] * cells["half_width"]) * diameter
    solid = np.clip(0.5 + (1 - raster.depth) * span[raster.cover], 0, 1) * (raster.cover > 0)
    rim = np.exp(-(((raster.depth - 0.88) / 0.14) ** 2))
    chromatin = cells["darkness"][raster.cover] * (0.94 + (0.1 + 0.08 * severity) * clumps + 0.2 * rim)
    nuclear = np.stack([chromatin + raster.nucleolus, 0.22 + 0.4 * raster.nucleolus])
    blur = 0.07 * diameter
    return np.maximum(gaussian_filter(amounts * (1 - solid) + solid * nuclear, (0, blur, blur)), 0)


def _expose(rng: np.random.Generator, amounts: np.ndarray, stain_rng: np.random.Generator) -> np.ndarray:
    """The RGB uint8 picture of stain concentrations (2, H, W) under a stain drawn from `stain_rng`."""
    stains = RUIFROK_HE + EOSIN_WARMTH + 0.025 * stain_rng.standard_normal((2, 3))
    stains = np.maximum(stains, 0.02)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    strength = np.exp(np.clip(0.2 * stain_rng.standard_normal(2), -0.4, 0.4))
    tint = stain_rng.uniform(0.01, 0.06) + stain_rng.uniform(0, 0.02, 3)
    # Not a matrix product: BLAS threads that wait on each other cost more than this computes.
    density = np.einsum("shw,sc->hwc", amounts, (strength[:, None] * stains).astype(np.float32)) + tint
    return from_optical_density(density + 0.012 * rng.standard_normal(density.shape, dtype=np.float32))

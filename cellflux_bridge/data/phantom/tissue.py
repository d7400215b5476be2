"""What a phantom's tissue is made of: glands, lumens, fibres and cells, before any of it reaches a pixel.

Lengths are in nuclear diameters, a position is a complex number, column + 1j * row. Every draw is made whatever the
severity, and only then moved by it: a seed keeps its glands, cells and fibres as severity rises, and cells join in a
fixed order.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

GLAND_SPACING, GLAND_RADIUS = 8.4, 3.5
BASAL_CELLS, INNER_CELLS, LUMENS = 15, 100, 4  # of a gland
GRID_STEP, GRID_MARGIN = 0.25, 1.5  # of the coarse grid that tissue is mapped on
# axis: unit vector along the long axis; outline: its harmonics 2, 3, 4 about the ellipse; darkness:
# haematoxylin concentration; nucleolus: offset from the position; joins: severity at which the cell appears.
_COMPLEX = ["position", "axis", "nucleolus"]
_REAL = ["half_length", "half_width", "darkness", "nucleolus_darkness", "joins"]
NUCLEUS = np.dtype([(n, "c8") for n in _COMPLEX] + [(n, "f4") for n in _REAL] + [("outline", "c8", (3,))])


@dataclass(frozen=True)
class _Glands:
    centre: np.ndarray  # (g,)
    radius: np.ndarray  # (g,)
    outline: np.ndarray  # (g, 3) harmonics 2, 3, 4
    lumen: np.ndarray  # (k,) centres, over all glands
    lumen_radius: np.ndarray  # (k,)


@dataclass(frozen=True)
class Tissue:
    """Maps on the coarse grid: distances are signed, negative inside, in diameters."""

    gland: np.ndarray
    lumen: np.ndarray
    fibre: np.ndarray  # level sets are collagen fibres
    along: np.ndarray  # unit vectors along the fibres
    mottle: np.ndarray  # noise of unit variance, as is `loose`
    loose: np.ndarray

    def at(self, name: str, position: np.ndarray) -> np.ndarray:
        """The map `name` at the grid points nearest to the positions."""
        index = np.rint((np.stack([position.imag, position.real]) + GRID_MARGIN) / GRID_STEP).astype(int)
        return getattr(self, name)[tuple(np.clip(index, 0, len(self.gland) - 1))]

    def lifted(self, size: int, diameter: float) -> np.ndarray:
        """Gland, lumen, fibre, mottle and loose at the pixels, (5, size, size), bilinear."""
        planes = np.stack([self.gland, self.lumen, self.fibre, self.mottle, self.loose])
        place = ((np.arange(size) + 0.5) / diameter + GRID_MARGIN) / GRID_STEP
        low = place.astype(int)
        share = (place - low).astype(np.float32)
        planes = planes[:, low] + share[:, None] * (planes[:, low + 1] - planes[:, low])
        return planes[:, :, low] + share * (planes[:, :, low + 1] - planes[:, :, low])


def place_tissue(rng: np.random.Generator, severity: float, extent: float) -> tuple[Tissue, np.ndarray]:
    """The tissue of a square field of `extent` nuclear diameters, and its cells (n,) NUCLEUS in the order they join."""
    glands = _lay_glands(rng, severity, extent)
    tissue = _map_tissue(rng, severity, glands, extent)
    glandular = _gland_cells(rng, severity, glands, tissue)
    cells = np.concatenate([glandular, _stroma_cells(rng, severity, tissue, extent)])
    from_middle = cells["position"] - np.complex64(extent / 2 * (1 + 1j))
    near = np.maximum(np.abs(from_middle.real), np.abs(from_middle.imag)) < extent / 2 + 1
    cells = cells[(cells["joins"] <= severity) & near]
    cells = _keep_apart(cells[np.argsort(cells["joins"], kind="stable")], overlap=0.02 + 0.18 * severity)
    return tissue, cells


def _complex_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def smooth_noise(rng: np.random.Generator, count: int, length: int, sigma: float) -> np.ndarray:
    """Gaussian noise (count, length, length) of about unit variance, smoothed by `sigma` samples."""
    noise = rng.standard_normal((count, length, length), dtype=np.float32)
    return gaussian_filter(noise, (0, sigma, sigma), mode="wrap", truncate=3) * np.float32(3.545 * sigma)


def _lay_glands(rng: np.random.Generator, severity: float, extent: float) -> _Glands:
    """Glands on a jittered hexagonal lattice; severity swells and deforms them and breaks up their lumens."""
    reach = int(np.ceil(extent / GLAND_SPACING)) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    lattice = columns + rows / 2 + 1j * np.sqrt(0.75) * rows
    lattice = (lattice + rng.random() + 1j * rng.random()) * GLAND_SPACING * np.exp(2j * np.pi * rng.random())
    lattice = lattice + 0.4 * _complex_normal(rng, lattice.shape)
    beyond = np.hypot(*np.maximum(np.abs([lattice.real, lattice.imag]) - extent / 2, 0))
    base = lattice[beyond < 1.4 * GLAND_RADIUS] + extent / 2 * (1 + 1j)
    count = len(base)
    centre = base + 0.6 * severity * _complex_normal(rng, (count,))
    radius = GLAND_RADIUS * (1 + 0.06 * rng.standard_normal(count))
    outline = (0.02 + 0.07 * severity) * _complex_normal(rng, (count, 3))
    # The first lumen is the gland's own; the rest are the punched-out holes of cribriform growth.
    angles = 2 * np.pi * (np.arange(LUMENS) + 0.7 * rng.random((count, LUMENS))) / (LUMENS - 1)
    away = rng.uniform(0.45, 0.65, (count, LUMENS)) * np.where(np.arange(LUMENS) == 0, 0.3 * severity, 1.0)
    opens = rng.uniform(0.25, 0.95, (count, LUMENS))
    hole = np.clip(2 * (severity - opens), 0, 0.3 + 0.4 * rng.random((count, LUMENS)))
    hole[:, 0] = (1 - severity) * (radius - 2.0) + severity * rng.uniform(-0.4, 0.7, count)
    radius = radius * (1 + 0.2 * severity)
    lumen = centre[:, None] + away * radius[:, None] * np.exp(1j * angles)
    open_ = hole > 0.2
    centre, lumen = centre.astype(np.complex64), lumen[open_].astype(np.complex64)
    return _Glands(centre, radius.astype(np.float32), outline, lumen, hole[open_].astype(np.float32))


def relative_outline(harmonics: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Relative radius of an outline with `harmonics` (..., 3) toward the unit complex directions `unit`."""
    second, third, fourth = (harmonics[..., k] for k in range(3))
    return np.maximum(1 + (unit**2 * (second + unit * (third + unit * fourth))).real, 0.4)


def _map_tissue(rng: np.random.Generator, severity: float, glands: _Glands, extent: float) -> Tissue:
    """Where glands, lumens and fibres lie, the edges warped more the higher the severity."""
    length = int(np.ceil((extent + 2 * GRID_MARGIN) / GRID_STEP)) + 1
    axis = (np.arange(length) * GRID_STEP - GRID_MARGIN).astype(np.float32)
    shift_column, shift_row, mottle = smooth_noise(rng, 3, length, 0.6 / GRID_STEP)
    ragged, loose = smooth_noise(rng, 2, length, 0.35 / GRID_STEP)
    (swirl,) = smooth_noise(rng, 1, length, 1.5 / GRID_STEP)
    point = axis + 1j * axis[:, None] + (0.05 + 0.3 * severity) * (shift_column + 1j * shift_row)
    point = point.astype(np.complex64)
    union = np.full(point.shape, 1e-3, dtype=np.float32)
    for centre, radius, outline in zip(glands.centre, glands.radius, glands.outline, strict=True):
        delta = point - centre
        distance = np.abs(delta) + np.float32(1e-6)
        union += np.exp(-3 * np.clip(distance - radius * relative_outline(outline, delta / distance), -9, 9))
    gland = -np.log(union) / 3
    lumen = np.full(point.shape, 9.0, dtype=np.float32)
    for centre, radius in zip(glands.lumen, glands.lumen_radius, strict=True):
        np.minimum(lumen, np.abs(point - centre) - radius, out=lumen)
    lumen = np.maximum(lumen + (0.05 + 0.12 * severity) * ragged, gland + 0.8)
    fibre = 0.6 * gland + 0.9 * swirl
    rows, columns = np.gradient(fibre)
    along = 1j * (columns + 1j * rows)
    return Tissue(gland, lumen, fibre, along / np.maximum(np.abs(along), 1e-6), mottle, loose)


def _shape_cells(
    rng: np.random.Generator, cells: np.ndarray, severity: float, size: float, aspect: float, spread: float
) -> None:
    """Fill in outline and chromatin of `cells`, of about the diameter `size` and `aspect`."""
    count = len(cells)
    size = size * np.exp(np.clip(spread * rng.standard_normal(count), -0.5, 0.4))
    stretch = np.sqrt(aspect * np.exp(np.clip(spread * rng.standard_normal(count), -0.2, 0.5)))
    cells["half_length"], cells["half_width"] = size / 2 * stretch, size / 2 / stretch
    cells["outline"] = (0.015 + 0.045 * severity) * _complex_normal(rng, (count, 3))
    uneven = 0.07 + 0.08 * severity
    cells["darkness"] = (1.38 + 0.26 * severity) * np.exp(uneven * rng.standard_normal(count))
    cells["nucleolus"] = 0.1 * size * _complex_normal(rng, (count,))
    cells["nucleolus_darkness"] = np.clip(2 * (severity - rng.uniform(0.4, 1.6, count)), 0, 0.8)


def _gland_cells(rng: np.random.Generator, severity: float, glands: _Glands, tissue: Tissue) -> np.ndarray:
    """Epithelial nuclei: one basal row at severity 0, piling up through the whole gland toward 1."""
    count, slots = len(glands.centre), BASAL_CELLS + INNER_CELLS
    jitter, depth, turn = rng.random((3, count, slots))
    basal = np.arange(slots) < BASAL_CELLS
    even = (np.arange(slots) + (0.25 + 0.6 * severity) * (jitter - 0.5)) / BASAL_CELLS
    toward = np.exp(2j * np.pi * np.where(basal, even, jitter))
    rim = glands.radius[:, None] * relative_outline(glands.outline[:, None], toward)
    ordered = rim - 0.8 + 0.1 * (depth - 0.5)
    mixing = np.where(basal, 0.5 * severity**2, 1.0)
    distance = (1 - mixing) * ordered + mixing * (rim - 0.4) * np.sqrt(depth)
    cells = np.zeros(count * slots, NUCLEUS)
    cells["position"] = (glands.centre[:, None] + distance * toward).ravel()
    astray = np.pi * (turn - 0.5) * np.where(basal, 0.1 + 0.9 * severity, 1)
    cells["axis"] = (toward * np.exp(1j * astray)).ravel()
    cells["joins"] = np.where(basal, 0.0, rng.uniform(0.05, 1.1, (count, slots))).ravel()
    _shape_cells(rng, cells, severity, 0.86 + 0.24 * severity, 1.2 + 0.15 * severity, 0.05 + 0.15 * severity)
    clear = tissue.at("lumen", cells["position"]) > 0.4
    return cells[clear & (tissue.at("gland", cells["position"]) < -0.3)]


def _stroma_cells(rng: np.random.Generator, severity: float, tissue: Tissue, extent: float) -> np.ndarray:
    """Spindle nuclei along the fibres, few at severity 0, more and plumper toward 1."""
    count = int(0.6 * (extent + 2) ** 2)
    cells = np.zeros(count, NUCLEUS)
    cells["position"] = (extent + 2) * (rng.random(count) + 1j * rng.random(count)) - (1 + 1j)
    cells["axis"] = tissue.at("along", cells["position"]) * np.exp(0.15j * rng.standard_normal(count))
    cells["joins"] = (rng.random(count) - 0.15) / 0.5
    _shape_cells(rng, cells, severity, 0.82 + 0.1 * severity, 2.7 - 0.6 * severity, 0.1 + 0.08 * severity)
    return cells[tissue.at("gland", cells["position"]) > 0.3]


def _keep_apart(cells: np.ndarray, *, overlap: float) -> np.ndarray:
    """Without the cells that come closer to an earlier one than touching, less the relative `overlap`.

    A nucleus stands for the discs of its half width at its middle and toward either end of its long axis.
    """
    if len(cells) < 2:
        return cells
    middle, reach, width = cells["position"], cells["half_length"], cells["half_width"]
    points = np.stack([middle.real, middle.imag], axis=1)
    pairs = cKDTree(points).query_pairs(2 * float(reach.max()), output_type="ndarray")
    first, second = pairs.T
    pairs = pairs[np.abs(middle[first] - middle[second]) < reach[first] + reach[second]]
    first, second = pairs.T
    tip = (reach - width) * cells["axis"]
    discs = middle[:, None] + tip[:, None] * np.array([-1, -0.5, 0, 0.5, 1], dtype=np.float32)
    gap = np.abs(discs[first, :, None] - discs[second, None]).min(axis=(1, 2))
    pairs = pairs[gap < (1 - overlap) * (width[first] + width[second])]
    alive = [True] * len(cells)
    for earlier, later in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
        if alive[earlier]:
            alive[later] = False
    return cells[alive]

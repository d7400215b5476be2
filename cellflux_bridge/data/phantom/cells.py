"""Phantom cells: made fluorescence images of single cells whose truth is known, and a measurement of them.

Channels are DNA, actin and tubulin. A treatment (`Effect`) moves the cells; the batch (`Batch`) is the microscope and
comes last. Lengths are in nuclear radii of control, a position is a complex number, column + 1j * row. Every draw is
made whatever the effect, and only then moved by it: a seed keeps its cells.
"""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.phantom.tissue import relative_outline, smooth_noise
from cellflux_bridge.images.fluorescence import measure_nuclei, nuclei_of

MIN_SIZE, MAX_SIZE = 32, 256
CHANNELS = ("dna", "actin", "tubulin")
CELL_RADIUS, SPACING = 2.3, 3.6  # of control, and the least distance of two cells
TRIES, JOINING = 60, 0.6  # places tried for neighbours, and the share of those free that control's fill
FINE = 2  # samples drawn a px and direction
BRIGHTNESS = (105, 160, 150)  # grey levels of the channels' full amounts at gain 1


class Effect(NamedTuple):
    """What a treatment does to cells: factors relative to control (all > 0), and the texture itself."""

    nuclear_size: float = 1.0  # of the nuclear radius
    nuclear_intensity: float = 1.0
    cell_area: float = 1.0
    actin_texture: float = 0.5  # in (0, 1): from round puncta to parallel stress fibres
    count: float = 1.0  # of neighbours


class Batch(NamedTuple):
    """What a day at the microscope does to images, whatever the cells."""

    illumination: float = 0.0  # in (-1, 1): brightness of the right border less that of the left one, of their mean
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of each channel
    blur: float = 0.6  # sigma in px
    background: float = 8.0  # grey levels


class Measurement(NamedTuple):
    """The main cell: its truth, or what an image tells of it."""

    nuclear_area: float  # px
    nuclear_intensity: float  # mean grey level less background; of the truth: at gain 1, without blur
    cell_area: float  # px inside the field
    actin_texture: float  # in [0, 1]; measured: how much the actin's edges share one direction


class PhantomCells(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8: DNA, actin, tubulin
    nuclei: np.ndarray  # (H, W) uint16: 0 background, 1 the main cell's nucleus, above those of neighbours
    truth: Measurement


class _Cells(NamedTuple):
    """Cells (n,), the main one first."""

    centre: np.ndarray
    radius: np.ndarray
    outline: np.ndarray  # (n, 3) harmonics 2, 3, 4
    axis: np.ndarray  # unit vectors along the fibres
    texture: np.ndarray
    nucleus: np.ndarray  # centres
    nuclear_radius: np.ndarray
    nuclear_shape: np.ndarray  # (n, 3) harmonics
    nucleoli: np.ndarray  # (n, 3) places relative to a nucleus of radius 1
    dna: np.ndarray  # amounts of the stains
    actin: np.ndarray
    tubulin: np.ndarray


def make_cells(effect: Effect, batch: Batch, *, size: int, seed: int) -> PhantomCells:
    """A field of `size` px a side with a main cell near its middle and parts of neighbours.

    `seed` >= 0 decides the cells and the camera's noise. A larger field shows larger cells, and more of them.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size}: expected {MIN_SIZE} to {MAX_SIZE} px")
    if not 0 < effect.actin_texture < 1 or min(effect) <= 0:
        raise UserError(f"{effect}: expected factors above 0 and a texture between 0 and 1")
    rng = np.random.default_rng([seed, 0])
    px = 6.5 * (size / 48) ** 0.5  # of a nuclear radius
    cells = _place(rng, effect, size / px)
    amounts, nuclei, bodies = _draw(rng, cells, size, px)
    levels = amounts * np.reshape(BRIGHTNESS, (3, 1, 1))
    areas = [np.count_nonzero(labels == 1) / FINE**2 for labels in (nuclei, bodies)]
    truth = Measurement(areas[0], float(levels[0][nuclei == 1].mean()), areas[1], float(cells.texture[0]))
    labels = (_pooled(nuclei > 0) >= 0.5) * nuclei.reshape(size, FINE, size, FINE).max((1, 3))
    image = _expose(np.random.default_rng([seed, 1]), np.stack([_pooled(plane) for plane in levels], axis=-1), batch)
    return PhantomCells(image, labels.astype(np.uint16), truth)


def _pooled(fine: np.ndarray) -> np.ndarray:
    size = len(fine) // FINE
    return fine.reshape(size, FINE, size, FINE).mean((1, 3))


def _harmonics(rng: np.random.Generator, count: int, strength: float) -> np.ndarray:
    return strength * (rng.standard_normal((count, 3, 2)).clip(-1.6, 1.6) @ [1, 1j]) / [1, 1.5, 2]


def _place(rng: np.random.Generator, effect: Effect, extent: float) -> _Cells:
    middle = extent / 2 * (1 + 1j)
    tried = (rng.random((TRIES, 2)) * (extent + 2 * CELL_RADIUS) - CELL_RADIUS) @ [1, 1j]
    tried[0] = middle + 0.25 * rng.standard_normal(2) @ [1, 1j]
    kept = [0]
    for number in range(1, TRIES):
        if np.abs(tried[kept] - tried[number]).min() > SPACING:
            kept.append(number)
    joins = np.where(np.arange(TRIES) == 0, 0, rng.random(TRIES))[kept] < JOINING * effect.count
    spread = np.clip(rng.standard_normal((6, TRIES)), -2.2, 2.2)
    second = rng.random(TRIES) < 0.25  # cells that have copied their DNA
    nuclear_radius = effect.nuclear_size * np.exp(0.08 * spread[0] + 0.12 * second)
    radius = CELL_RADIUS * np.sqrt(effect.cell_area) * np.exp(0.12 * spread[1] + 0.05 * second)
    radius = np.maximum(radius, 1.25 * nuclear_radius)
    axis = np.exp(2j * np.pi * rng.random(TRIES))
    outline, shape = _harmonics(rng, TRIES, 0.08), _harmonics(rng, TRIES, 0.035)
    outline[:, 0] += 0.12 * axis.conj() ** 2  # longer along its fibres
    shape[:, 0] += 0.1 * np.exp(0.5j * rng.standard_normal(TRIES)) * axis.conj() ** 2
    off = 0.3 * (radius - nuclear_radius) * (rng.standard_normal((TRIES, 2)).clip(-1.2, 1.2) @ [1, 1j])
    spots = 0.45 * rng.standard_normal((TRIES, 3, 2)).clip(-1.3, 1.3) @ [1, 1j]
    cells = _Cells(
        centre=tried,
        radius=radius,
        outline=outline,
        axis=axis,
        texture=expit(logit(effect.actin_texture) + 0.6 * spread[2]),
        nucleus=tried + off,
        nuclear_radius=nuclear_radius,
        nuclear_shape=shape,
        nucleoli=spots,
        dna=effect.nuclear_intensity * np.exp(0.17 * spread[3]),
        actin=np.exp(0.2 * spread[4]),
        tubulin=np.exp(0.2 * spread[5]),
    )
    return _Cells(*(values[kept][joins] for values in cells))


def _draw(rng: np.random.Generator, cells: _Cells, size: int, px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amounts (3, n, n) of the three stains, and the label of each sample's nucleus and cell; n = size * FINE."""
    axis = (np.arange(size * FINE) + 0.5) / (FINE * px)
    point = axis + 1j * axis[:, None]
    warp_x, warp_y, patchy = smooth_noise(rng, 3, len(axis), 0.45 * FINE * px)
    chromatin, grain, jitter = smooth_noise(rng, 3, len(axis), 0.13 * FINE * px)
    fibres, rays = gaussian_filter(rng.standard_normal((2, len(cells.centre), 512)), (0, 0, 2)) * 2.66
    ragged = point + 0.09 * (warp_x + 1j * warp_y)

    nuclear = _relative_radius(point, cells.nucleus, cells.nuclear_radius, cells.nuclear_shape)
    its, depth = nuclear.argmin(axis=0), nuclear.min(axis=0)
    radius = cells.nuclear_radius[its]
    solid = np.clip(0.5 + (1 - depth) * radius * px, 0, 1)
    holes = np.abs(((point - cells.nucleus[its]) / radius)[..., None] - cells.nucleoli[its])
    holes = np.exp(-((holes / 0.22) ** 2)).sum(axis=-1).clip(0, 1)
    dna = cells.dna[its] * solid * (1.05 - 0.2 * depth**2) * (1 + 0.13 * chromatin) * (1 - 0.4 * holes)

    reach = _relative_radius(ragged, cells.centre, cells.radius, cells.outline)
    own = reach.argmin(axis=0)
    first, second = np.partition(np.concatenate([reach, np.full((1, *point.shape), 9.0)]), 1, axis=0)[:2]
    edge = cells.radius[own] * np.minimum(1 - first, 0.5 * (second - first))  # depth below the cell's border
    inside = expit(12 * cells.radius[own] * (1 - first))
    thick = np.clip(edge / 0.8, 0, 1)

    along = (ragged - cells.centre[own]) * cells.axis[own].conj()
    across = along.imag + 0.04 * along.real**2 + 0.05 * warp_y
    fibre = np.clip((_along_line(fibres, own, 16 * across) + 0.25) * (0.8 + 0.35 * patchy), 0, 2.2)
    puncta = 1.3 * np.clip(grain - 0.5, 0, None)
    texture = cells.texture[own] * fibre + (1 - cells.texture[own]) * puncta
    cortex = np.exp(-(((edge - 0.12) / 0.16) ** 2)) * (0.8 + 0.2 * jitter)
    actin = inside * cells.actin[own] * (0.14 + 0.1 * thick + 0.42 * cortex + 0.55 * thick * texture)

    ray = point - cells.nucleus[own] - 0.5 * cells.nuclear_radius[own] * cells.axis[own]
    spokes = _along_line(rays, own, 28 * (np.angle(ray) + 0.12 * warp_x + 0.05 * jitter))
    mesh = np.clip(0.8 + 0.24 * spokes * np.clip(np.abs(ray), 0, 1) + 0.14 * jitter, 0.15, None)
    haze = 0.3 + 0.7 * np.exp(-np.clip(depth - 1, 0, None) * radius / 0.9)
    tubulin = inside * cells.tubulin[own] * haze * mesh * (0.35 + 0.65 * thick) * (1 - 0.55 * solid)
    return np.stack([dna + 0.03 * inside, actin, tubulin]), (its + 1) * (depth < 1), (own + 1) * (first < 1)


def _relative_radius(point: np.ndarray, centre: np.ndarray, radius: np.ndarray, harmonics: np.ndarray) -> np.ndarray:
    """Distance (n, ...) of points from n centres, 1 at their outlines."""
    delta = point - centre[:, None, None]
    distance = np.abs(delta) + 1e-6
    return distance / (radius[:, None, None] * relative_outline(harmonics[:, None, None], delta / distance))


def _along_line(lines: np.ndarray, own: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The noise `lines` (n, length) of each sample's own cell at `place` from the middle, linear between its points."""
    place = np.clip(place + lines.shape[1] / 2, 0, lines.shape[1] - 1.001)
    low = place.astype(int)
    return lines[own, low] + (place - low) * (lines[own, low + 1] - lines[own, low])


def _expose(rng: np.random.Generator, amounts: np.ndarray, batch: Batch) -> np.ndarray:
    """The uint8 picture that a camera takes of grey levels (H, W, 3)."""
    sharp = gaussian_filter(amounts, (batch.blur, batch.blur, 0))
    glow = gaussian_filter(amounts, (6 * batch.blur, 6 * batch.blur, 0))
    field = 1 + batch.illumination * np.linspace(-0.5, 0.5, amounts.shape[1])[:, None]
    light = (0.88 * sharp + 0.12 * glow) * field * np.array(batch.gain) + batch.background
    noisy = light + np.sqrt(0.6 + 0.12 * light) * rng.standard_normal(light.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def measure(image: np.ndarray) -> Measurement:
    """The cell whose nucleus is nearest to the middle of an image (H, W, 3) of any number type, found in it alone.

    All are NaN where no nucleus is found.
    """
    from skimage.feature import structure_tensor
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    dna, actin, tubulin = np.moveaxis(np.asarray(image, dtype=np.float64), -1, 0)
    nuclei, main = nuclei_of(dna)
    if not main:
        return Measurement(*[float("nan")] * 4)
    both = gaussian_filter(sum(np.sqrt(plane / max(plane.mean(), 1e-9)) for plane in (actin, tubulin)), 1)
    bodies = (both > threshold_otsu(both)) | (nuclei > 0)
    cell = watershed(-gaussian_filter(tubulin, 1.5), nuclei, mask=bodies) == main
    edges = structure_tensor(gaussian_filter(actin, 0.5), sigma=1, order="rc")
    down, cross, right = (plane[cell].sum() for plane in edges)
    coherence = np.hypot(down - right, 2 * cross) / max(down + right, 1e-9)
    return Measurement(*measure_nuclei(dna)[:2], float(cell.sum()), float(coherence))

"""What is not a nucleus and looks like one to a rule of colours, drawn: pen, red cells, borders, folds, mucus.

A painter takes RGB (H, H, 3) float32 in [0, 1], its label map (H, H), and the typical nuclear diameter in px, and
returns both changed: where something opaque lies there is no nucleus.
"""

from collections.abc import Callable

import numpy as np

from cellflux_bridge.cellularity.label_sets import Crop
from cellflux_bridge.data.phantom.drawing import EOSIN_WARMTH
from cellflux_bridge.data.phantom.tissue import smooth_noise
from cellflux_bridge.images.stain import RUIFROK_HE

_PENS = ((0.12, 0.24, 0.66), (0.15, 0.5, 0.28), (0.1, 0.1, 0.1), (0.75, 0.1, 0.15))
Painter = Callable[[np.random.Generator, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def _cover(rgb: np.ndarray, labels: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`colour` (3,) or (H, H, 3) laid over with `alpha` (H, H)."""
    share = alpha[..., None].astype(np.float32)
    return (1 - share) * rgb + share * colour.astype(np.float32), np.where(alpha > 0.5, 0, labels)


def _soft(distance: np.ndarray, edge: float = 1.0) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, over about `edge` px."""
    return np.clip(0.5 - distance / edge, 0, 1)


def _band(rng: np.random.Generator, size: int, width: float, *, bend: float) -> np.ndarray:
    """Signed distance (size, size) to a bent band across the field, negative inside."""
    angle, middle = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4) * size
    axis = np.arange(size) - size / 2
    along = axis * np.sin(angle) + axis[:, None] * np.cos(angle)
    across = axis * np.cos(angle) - axis[:, None] * np.sin(angle)
    wave = bend * size * np.sin(along / size * rng.uniform(1, 4) + rng.uniform(0, 6))
    return np.abs(across - middle + wave) - width / 2


def _region(rng: np.random.Generator, size: int) -> np.ndarray:
    """Signed distance-like field (size, size) of blotches that cover about a third, negative inside."""
    (noise,) = smooth_noise(rng, 1, size, size / rng.uniform(5, 12))
    return (0.4 - noise) * size / 10


def _stained(rng: np.random.Generator, amounts: np.ndarray) -> np.ndarray:
    """RGB (..., 3) of amounts (..., 2) of haematoxylin and eosin, by vectors about Ruifrok's."""
    vectors = np.maximum(RUIFROK_HE + EOSIN_WARMTH + rng.normal(0, 0.05, (2, 3)), 0.02)
    return np.exp(-amounts @ vectors).astype(np.float32)


def pen(rng, rgb, labels, diameter):
    """A stroke in blue, green, black, red or any dark colour, nearly opaque."""
    colours = (*_PENS, rng.uniform(0, 0.6, 3))
    colour = np.clip(colours[rng.integers(len(colours))] + rng.normal(0, 0.07, 3), 0, 1)
    distance = _band(rng, len(rgb), rng.uniform(0.05, 0.6) * len(rgb), bend=rng.uniform(0, 0.2))
    return _cover(rgb, labels, colour, rng.uniform(0.8, 1.0) * _soft(distance, rng.uniform(1, 5)))


def border(rng, rgb, labels, diameter):
    """A straight band along one side: black, white or grey."""
    side, depth = rng.integers(4), rng.uniform(0.03, 0.5) * len(rgb)
    away = np.rot90(np.broadcast_to(np.arange(len(rgb)) - depth, rgb.shape[:2]), side)
    return _cover(rgb, labels, np.full(3, rng.choice([0.0, 1.0, rng.random()])), _soft(away))


def red_cells(rng, rgb, labels, diameter):
    """Round red cells, alone and in crowds, some with a pale middle."""
    size, num = len(rgb), rng.integers(1, 60)
    spread = size / 2 if rng.random() < 0.5 else rng.uniform(2, 6) * diameter
    base = np.array([rng.uniform(0.6, 0.95), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.5)])
    pale, flat, radius = rng.uniform(0, 0.6), rng.uniform(0.6, 1.0), rng.uniform(0.3, 0.65) * diameter
    centre = rng.uniform(0, size, 2)
    for place in centre + rng.uniform(-spread, spread, (num, 2)):
        own, angle = radius * rng.uniform(0.8, 1.2), rng.uniform(0, np.pi)
        low, high = (np.clip(place + sign * (own + 2), 0, size).astype(int) for sign in (-1, 1))
        if (high <= low).any():
            continue
        cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        y, x = np.ogrid[cut]
        dy, dx = y - place[0], x - place[1]
        u, v = dx * np.cos(angle) + dy * np.sin(angle), (dy * np.cos(angle) - dx * np.sin(angle)) / flat
        away = np.hypot(u, v)
        colour = base + pale * (1 - base) * np.exp(-((away / (0.5 * own)) ** 2))[..., None] + rng.normal(0, 0.02, 3)
        rgb, labels = rgb.copy(), labels.copy()
        rgb[cut], labels[cut] = _cover(rgb[cut], labels[cut], np.clip(colour, 0, 1), 0.95 * _soft(away - own, 1.5))
    return rgb, labels


def fold(rng, rgb, labels, diameter):
    """A band in which tissue lies double: its density is higher. Nuclei stay nuclei."""
    inside = _soft(_band(rng, len(rgb), rng.uniform(0.1, 0.5) * len(rgb), bend=0.2), 4)[..., None]
    return (np.maximum(rgb, 1 / 255) ** (1 + rng.uniform(0.3, 1.0) * inside)).astype(np.float32), labels


def _blotches(amounts_of: Callable) -> Painter:
    def paint(rng, rgb, labels, diameter):
        size = len(rgb)
        angle, (noise, coarse) = rng.uniform(0, np.pi), smooth_noise(rng, 2, size, max(0.1 * diameter, 0.6))
        axis = np.arange(size)
        across = axis * np.cos(angle) + axis[:, None] * np.sin(angle)
        strands = np.sin(across / diameter * rng.uniform(3, 12) + 1.5 * coarse)
        colour = _stained(rng, np.maximum(amounts_of(rng, strands, noise), 0))
        return _cover(rgb, labels, colour, _soft(_region(rng, size), 3))

    return paint


# Wispy pale blue; pink fibres; glass.
mucus = _blotches(lambda rng, s, n: np.stack([rng.uniform(0.1, 0.4) * (1 + 0.4 * s) + 0.05 * n, 0.05 + 0 * s], axis=-1))
fibres = _blotches(lambda rng, s, n: np.stack([0.05 + 0.03 * n, rng.uniform(0.3, 1.2) * (1 + 0.35 * s) + 0.1 * n], -1))
glass = _blotches(lambda rng, s, n: 0.03 + rng.uniform(0, 0.02) * np.stack([n, n], axis=-1))


def ink(rng, rgb, labels, diameter):
    """Specks of dust and ink: small, ragged, black or brown."""
    ragged, large = smooth_noise(rng, 2, len(rgb), max(rng.uniform(0.08, 0.25) * diameter, 0.6))
    colour = rng.uniform(0, 0.15) + np.array([0.2, 0.1, 0.0]) * rng.random()
    return _cover(rgb, labels, colour, _soft(2.2 - ragged - 0.3 * large, 0.3))


PAINTERS: tuple[Painter, ...] = (pen, border, red_cells, red_cells, fold, mucus, fibres, glass, ink)


def paint(rng: np.random.Generator, crop: Crop, *, diameter: float) -> Crop:
    """One or two artefacts laid over a crop."""
    rgb, labels = crop.rgb, crop.labels
    for number in rng.choice(len(PAINTERS), rng.integers(1, 3), replace=False):
        rgb, labels = PAINTERS[number](rng, rgb, labels, diameter)
    return crop._replace(rgb=rgb, labels=labels)


def empty_field(rng: np.random.Generator, size: int, diameter: float) -> np.ndarray:
    """RGB (size, size, 3) of ground without cells: from glass to dense eosin."""
    slow, fine = smooth_noise(rng, 1, size, size / 8)[0], smooth_noise(rng, 1, size, max(0.15 * diameter, 0.6))[0]
    eosin = rng.uniform(0, 0.8) * (1 + 0.2 * slow + rng.uniform(0, 0.3) * fine)
    return _stained(rng, np.maximum(np.stack([rng.uniform(0, 0.12) + 0 * eosin, eosin], axis=-1), 0))


def drawn_field(rng: np.random.Generator, size: int, diameter: float) -> Crop:
    """A field of plain cells: ellipses in haematoxylin, even, rimmed or pale inside, that may touch."""
    rgb, labels = empty_field(rng, size, diameter), np.zeros((size, size), np.int64)
    most = int(rng.uniform(0, 0.5) * size**2 / diameter**2)
    dark, rim, spread = rng.uniform(0.5, 1.8), rng.uniform(0, 0.8), rng.uniform(0.02, 0.3)
    placed, diameters, gap = np.empty((0, 3)), [0.0], rng.uniform(0.85, 1.4)
    rows, columns = np.ogrid[:size, :size]
    for place in rng.uniform(0, size, (3 * most, 2)):
        radius = 0.5 * diameter * np.exp(rng.normal(0, spread))
        if len(diameters) > most:
            break
        if (np.hypot(*(placed[:, :2] - place).T) < gap * (placed[:, 2] + radius)).any():
            continue
        flat, angle = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
        dy, dx = rows - place[0], columns - place[1]
        u, v = dx * np.cos(angle) + dy * np.sin(angle), (dy * np.cos(angle) - dx * np.sin(angle)) / flat
        away = np.hypot(u, v) / radius
        amount = dark * rng.uniform(0.7, 1.3) * (1 - rim * np.clip(1.2 - away, 0, 1))
        colour = _stained(rng, np.stack([amount, 0.15 + 0 * amount], axis=-1))
        rgb, _ = _cover(rgb, labels, colour, _soft((away - 1) * radius, rng.uniform(0.5, 2)))
        labels[away < 1] = len(diameters)
        diameters.append(2 * radius * np.sqrt(flat))
        placed = np.vstack([placed, [*place, radius]])
    return Crop(rgb, labels, np.array(diameters))

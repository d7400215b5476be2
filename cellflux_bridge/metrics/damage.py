"""Known damage to real patches: what a measure must see before it is believed.

Damaged real patches are compared with undamaged ones as made ones are. An extractor that does not see them would not
see a made image's faults, either.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from cellflux_bridge import images
from cellflux_bridge.metrics.values import Value

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _each(patches: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` of every patch (H, W, 3) of (N, 3, H, W)."""
    return np.stack([change(patch) for patch in patches.transpose(0, 2, 3, 1)]).transpose(0, 3, 1, 2)


def _blur(patches: np.ndarray, _, *, sigma: float) -> np.ndarray:
    return _uint8(gaussian_filter(patches.astype(np.float32), (0, 0, sigma, sigma)))


def _noise(patches: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return _uint8(patches + generator.normal(0, 8, patches.shape))


def _jpeg(patches: np.ndarray, _) -> np.ndarray:
    def compressed(patch: np.ndarray) -> np.ndarray:
        file = BytesIO()
        Image.fromarray(patch).save(file, "JPEG", quality=30)
        return np.asarray(Image.open(file))

    return _each(patches, compressed)


def _half_size(patches: np.ndarray, _) -> np.ndarray:
    height, width = patches.shape[2:]
    return _each(patches, lambda patch: images.resize(images.resize(patch, height // 2, width // 2), height, width))


def _shuffled(patches: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The four tiles, each an eighth of the shorter side, of every square of 2 x 2 change places."""
    side = max(1, min(patches.shape[2:]) // 8)
    rows, columns = (length // (2 * side) for length in patches.shape[2:])
    result = patches.copy()
    part = patches[:, :, : 2 * side * rows, : 2 * side * columns]
    tiles = part.reshape(len(patches), 3, rows, 2, side, columns, 2, side).transpose(0, 2, 5, 3, 6, 1, 4, 7)
    tiles = tiles.reshape(len(patches), rows, columns, 4, 3, side, side)
    order = generator.permuted(np.broadcast_to(np.arange(4), tiles.shape[:4]), axis=3)
    tiles = np.take_along_axis(tiles, order[..., None, None, None], axis=3)
    tiles = tiles.reshape(len(patches), rows, columns, 2, 2, 3, side, side).transpose(0, 5, 1, 3, 6, 2, 4, 7)
    result[:, :, : 2 * side * rows, : 2 * side * columns] = tiles.reshape(part.shape)
    return result


def _blend(patches: np.ndarray, _) -> np.ndarray:
    """With the patch half of the set away, which is of another group wherever groups stand together."""
    return _uint8((patches.astype(np.float32) + np.roll(patches, len(patches) // 2, axis=0)) / 2)


DAMAGES: dict[str, Damage] = {
    "blur of 0.5 px": partial(_blur, sigma=0.5),
    "blur of 1 px": partial(_blur, sigma=1.0),
    "blur of 2 px": partial(_blur, sigma=2.0),
    "noise of 8 grey levels": _noise,
    "JPEG of quality 30": _jpeg,
    "half the resolution": _half_size,
    "tiles that changed places": _shuffled,
    "blends of two patches": _blend,
}
# How the "method" of values of damaged patches begins (`metrics.values`).
DAMAGED = "real target with "
# The quantity that says how far a network sees damaged patches from undamaged ones.
RESPONSE = "damage_response"
# Who does not see these is blind: made patches are blurred, and they are blends, before they are anything else.
BLUR = "blur of 1 px"
MUST_SEE = (BLUR, "blends of two patches")
# Seen: farther away than three standard deviations of the distance of real patches to real ones.
SEEN = 3.0


def in_blurs(kid: float, of_blurred: float) -> float:
    """A distance to real patches, where that of real patches after `BLUR` is 1; NaN where that is not seen. KID is
    the square of a distance."""
    return math.sqrt(max(kid, 0) / of_blurred) if of_blurred > 0 else math.nan


def blind_for(rows: Sequence[Value]) -> dict[str, list[str]]:
    """By network: the damage that it must see and does not; networks that see all of it have none."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.quantity == RESPONSE and not row.value >= SEEN:
            name = row.method.removeprefix(DAMAGED)
            found.setdefault(row.extractor, []).extend([name] if name in MUST_SEE else [])
    return {network: names for network, names in found.items() if names}

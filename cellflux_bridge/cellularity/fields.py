"""Label maps as fields that a network can regress, and nuclei out of such fields."""

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from cellflux_bridge.cellularity.network import (
    DEPTH,
    DIAMETER,
    DIAMETER_UNIT,
    FOREGROUND,
    NUM_FIELDS,
    OFFSET,
    OFFSET_UNIT,
)


def fields_of(labels: np.ndarray, diameters: np.ndarray | None = None) -> np.ndarray:
    """The fields (5, H, W) float32 of a label map (H, W): foreground 0 or 1, depth, offset, diameter (see `network`).

    `diameters` (max + 1,) px are those of the whole nuclei by number, where the map shows parts; by default they follow
    from the areas in the map.
    """
    fields = np.zeros((NUM_FIELDS, *labels.shape), np.float32)
    numbers, compact = np.unique(labels, return_inverse=True)
    if numbers[0] != 0:  # no background in sight
        numbers, compact = np.concatenate([[0], numbers]), compact + 1
    compact = compact.reshape(labels.shape)
    if len(numbers) == 1:
        return fields
    inside = compact > 0
    row, column = np.nonzero(inside)
    of = compact[inside]
    areas = np.maximum(np.bincount(of, minlength=len(numbers)), 1)
    depth = ndimage.distance_transform_edt(_apart(compact))[inside]
    deepest = np.zeros(len(numbers))
    np.maximum.at(deepest, of, depth)
    fields[FOREGROUND] = inside
    fields[DEPTH][inside] = depth / np.maximum(deepest, 1)[of]
    for number, place in enumerate((row, column)):
        centre = np.bincount(of, place, minlength=len(numbers)) / areas
        fields[2 + number][inside] = (centre[of] - place) / OFFSET_UNIT
    whole = 2 * np.sqrt(areas / np.pi) if diameters is None else diameters[numbers]
    fields[DIAMETER][inside] = np.log2(np.maximum(whole, 1)[of] / DIAMETER_UNIT)
    return fields


def _apart(labels: np.ndarray) -> np.ndarray:
    """Nuclear pixels, less those that have another nucleus to the right or below: touching nuclei have a gap."""
    apart = labels > 0
    for axis in (0, 1):
        ahead, behind = (np.moveaxis(labels, axis, 0)[cut] for cut in (slice(1, None), slice(None, -1)))
        np.moveaxis(apart, axis, 0)[:-1] &= (ahead == behind) | (ahead == 0)
    return apart


# In px of the network: the Gaussians that smooth the foreground, votes and depth, and how far apart two centres are at
# least.
_SMOOTHING, _VOTE_SPREAD, _DEPTH_SPREAD, _APART = 1.0, 2.0, 2.0, 3
# Of votes plus depth, each about 1 in the middle of a nucleus: the least at a centre. More votes than so many say no
# more: a small nucleus gathers all of its own in one place.
_LEAST, _MOST_VOTES = 0.75, 1.2
_FEWEST_PIXELS = 8


def nuclei_of(fields: np.ndarray, *, core: tuple[int, int, int] | None = None) -> np.ndarray:
    """The label map (H, W) int32 of fields (5, H, W) float32, numbered 1..n.

    Every nuclear pixel votes for its centre; a whole nucleus has one vote to give. Centres are the peaks of a landscape
    of votes and depth, and a watershed of it shares the nuclear pixels out among them. Pixels that reach no centre are
    background. With `core` (row, column, side) only nuclei with a centre in that square are kept.
    """
    shape, mask = fields.shape[1:], _smooth(fields[FOREGROUND], _SMOOTHING, mode="nearest") > 0
    height = np.where(mask, np.minimum(_votes(fields, mask), _MOST_VOTES), 0)
    height += np.where(mask, _smooth(np.where(mask, fields[DEPTH], 0), _DEPTH_SPREAD), 0)
    peaks = (height == ndimage.maximum_filter(height, 2 * _APART + 1)) & (height > _LEAST)
    markers, num = ndimage.label(peaks, structure=np.ones((3, 3)))
    if num == 0:
        return np.zeros(shape, np.int32)
    labels = watershed(-height, markers, mask=mask)
    keep = np.bincount(labels.ravel(), minlength=num + 1) >= _FEWEST_PIXELS
    keep[0] = False
    if core is not None:
        first = np.zeros(num + 1, np.int64)
        first[markers.ravel()[::-1]] = np.arange(markers.size)[::-1]  # the first pixel of every marker
        top, left, side = core
        row, column = np.divmod(first, shape[1])
        keep &= (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


def _votes(fields: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """For every pixel (H, W) how many nuclei have their centre there, by the offsets of nuclear pixels."""
    place = np.nonzero(mask)
    voted = [
        np.clip(np.rint(at + OFFSET_UNIT * offset[mask]), 0, side - 1).astype(np.int64)
        for at, offset, side in zip(place, fields[OFFSET], mask.shape, strict=True)
    ]
    area = np.pi / 4 * DIAMETER_UNIT**2 * 4 ** np.clip(fields[DIAMETER][mask], -3, 3)
    votes = np.bincount(voted[0] * mask.shape[1] + voted[1], 1 / area, minlength=mask.size).reshape(mask.shape)
    return _smooth(votes, _VOTE_SPREAD) * (2 * np.pi * _VOTE_SPREAD**2)


def _smooth(values: np.ndarray, sigma: float, *, mode: str = "constant") -> np.ndarray:
    return ndimage.gaussian_filter(values.astype(np.float32), sigma, mode=mode, truncate=3)

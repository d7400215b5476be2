"""Splitting a mask into nuclei: a watershed that floods too many basins, and the merging of those with no neck between.

Numbers are relative to a typical nuclear radius, so one set of parameters serves every magnification.
"""

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from cellflux_bridge.cellularity.parameters import Parameters

# Of a straight border at a random angle, the number of neighbouring pixel pairs across it a pixel of its length.
_PAIRS_A_PIXEL = 1.27


def split(
    mask: np.ndarray, distance: np.ndarray, density: np.ndarray, radius: float, parameters: Parameters
) -> np.ndarray:
    """Label map (H, W) int32 of `mask` (H, W) bool; some numbers stay unused.

    The landscape is `distance` to the background (H, W) px over `radius` px, plus `density_weight` times `density`
    (H, W; 1 is a typical nucleus's) less its mean over a square of `density_reach` to either side: inside a clump,
    nuclei are darker than what lies between them. `landscape_smoothing` and `density_smoothing` are those of Gaussians;
    both, and the reach, are in radii. The peaks are flooded. Two neighbouring basins become one where the pass between
    them lies less than `split_depth` below the lower peak, times (length of their border / diameter of the smaller) to
    `neck_power`: the narrower the neck, the shallower it may be.
    """
    reach = parameters.landscape_smoothing * radius
    height = ndimage.gaussian_filter(distance / np.float32(radius), reach, truncate=3)
    fine = ndimage.gaussian_filter(density, max(parameters.density_smoothing * radius, 0.5), truncate=2.5)
    around = ndimage.uniform_filter(fine, max(3, 2 * round(parameters.density_reach * radius) + 1))
    height += np.float32(parameters.density_weight) * (fine - around)
    peaks = mask & (height == ndimage.maximum_filter(height, max(3, 2 * round(reach) + 1)))
    markers, num = ndimage.label(peaks, structure=np.ones((3, 3)))
    if num == 0:
        return np.zeros(mask.shape, np.int32)
    top = np.zeros(num + 1)
    top[markers[peaks]] = height[peaks]
    return _merge(watershed(-height, markers, mask=mask), height, top, parameters)


def _borders(basins: np.ndarray, height: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every two basins that touch: their labels (P,) and (P,), the highest pass (P,), the border's length (P,)."""
    keys, passes = [], []
    for axis in (0, 1):
        ahead, behind = (slice(1, None), slice(None)), (slice(None, -1), slice(None))
        one, other = (basins[cut[:: 1 - 2 * axis]] for cut in (ahead, behind))
        heights = np.minimum(*(height[cut[:: 1 - 2 * axis]] for cut in (ahead, behind)))
        touch = (one != other) & (one > 0) & (other > 0)
        low, high = np.minimum(one[touch], other[touch]), np.maximum(one[touch], other[touch])
        keys.append(low.astype(np.int64) * (num + 1) + high)
        passes.append(heights[touch])
    key, over = np.concatenate(keys), np.concatenate(passes)
    order = np.lexsort((-over, key))
    key, over = key[order], over[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    length = np.diff(starts, append=len(key)) / _PAIRS_A_PIXEL
    return key[starts] // (num + 1), key[starts] % (num + 1), over[starts], length


def _merge(basins: np.ndarray, height: np.ndarray, top: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Join basins with peaks of height `top` (num + 1,), highest pass first; the higher peak is the joined one's."""
    num = len(top) - 1
    first, second, over, length = _borders(basins, height, num)
    area = np.bincount(basins.ravel(), minlength=num + 1)
    diameter = 2 * np.sqrt(np.maximum(np.minimum(area[first], area[second]), 1) / np.pi)
    tolerance = parameters.split_depth * (length / diameter) ** parameters.neck_power
    root, peak = list(range(num + 1)), top.tolist()

    def find(label: int) -> int:
        while root[label] != label:
            root[label] = root[root[label]]
            label = root[label]
        return label

    order = np.argsort(-over, kind="stable")
    for one, other, saddle, allowed in zip(*(x[order].tolist() for x in (first, second, over, tolerance)), strict=True):
        lower, higher = sorted((find(one), find(other)), key=peak.__getitem__)
        if lower != higher and peak[lower] - saddle < allowed:
            root[lower] = higher
    return np.array([find(label) for label in range(num + 1)], np.int32)[basins]

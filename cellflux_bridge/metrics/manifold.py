"""Precision, recall, density and coverage: whether images lie where real ones lie, and the other way round.

Both sets' neighbourhoods are balls in a network's features: about every image, as far as its k-th nearest neighbour.
As everywhere, two images of one group (patches of a tile, a frame and the patch that it was made from) are not
independent: such pairs are no neighbours, else copying the source would be perfectly precise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.statistics import half_splits
from cellflux_bridge.metrics.fidelity import Floor, floor_of, group_codes

# k of precision and recall (Kynkaanniemi et al. 2019), and of density and coverage (Naeem et al. 2020).
NUM_NEIGHBOURS, NUM_NEIGHBOURS_OF_DENSITY = 3, 5
FIGURES = ("precision", "recall", "density", "coverage")
_BLOCK = 512


class Neighbourhoods(NamedTuple):
    """The items whose means are the four figures; all NaN where an image has fewer than k of another group beside it.

    precision (N,)  1 for a frame inside the ball of a real patch, else 0
    recall (M,)     1 for a real patch inside the ball of a frame
    density (N,)    in how many real patches' balls a frame lies, over k; its mean is not bounded by 1
    coverage (M,)   1 for a real patch whose ball holds a frame
    """

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray


def squared_distances(x: np.ndarray, y: np.ndarray, y_squared: np.ndarray | None = None) -> np.ndarray:
    """|x_i - y_j|^2 of float64 features (N, D) and (M, D), (N, M); `y_squared` (M,) is |y_j|^2 where it is known."""
    y_squared = (y**2).sum(1) if y_squared is None else y_squared
    return np.maximum((x**2).sum(1)[:, None] + y_squared - 2 * x @ y.T, 0)


def _radii(x: np.ndarray, codes: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances (N,) to the 3rd and the 5th nearest of another group; infinite where there are fewer."""
    ks = (NUM_NEIGHBOURS, NUM_NEIGHBOURS_OF_DENSITY)
    found = np.full((len(ks), len(x)), np.inf)
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        squared = np.where(codes[rows, None] != codes, squared_distances(x[rows], x), np.inf)
        for k, radii in zip(ks, found, strict=True):
            if k <= len(x):
                radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return found[0], found[1]


def neighbourhoods(
    frames: np.ndarray,
    real: np.ndarray,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    real_groups: Sequence[str] | np.ndarray | None = None,
    block: int = _BLOCK,
) -> Neighbourhoods:
    """Where frames (N, D) lie among real patches (M, D) and these among them; without groups as published.

    Distances are made in blocks of rows: memory is linear in the number of images.
    """
    frames, real = np.asarray(frames, np.float64), np.asarray(real, np.float64)
    own, of_real = group_codes(groups, real_groups, len(frames), len(real))
    (balls, _), (real_balls, real_balls_of_density) = _radii(frames, own, block), _radii(real, of_real, block)
    precise, dense = np.zeros(len(frames)), np.zeros(len(frames))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(frames), block):
        rows = slice(start, start + block)
        squared = np.where(own[rows, None] != of_real, squared_distances(frames[rows], real), np.inf)
        inside = squared <= real_balls_of_density
        precise[rows] = (squared <= real_balls).any(1)
        dense[rows] = inside.sum(1) / NUM_NEIGHBOURS_OF_DENSITY
        recalled |= (squared <= balls[rows, None]).any(0)
        covered |= inside.any(0)
    enough, enough_real, enough_for_density = (
        len(radii) > 0 and np.isfinite(radii).all() for radii in (balls, real_balls, real_balls_of_density)
    )
    undefined = [not enough_real, not (enough and enough_real), not enough_for_density, not enough_for_density]
    found = (precise, recalled, dense, covered)
    return Neighbourhoods(*(np.where(no, np.nan, each) for no, each in zip(undefined, found, strict=True)))


def manifold_floors(
    features: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    generator: np.random.Generator,
    num_splits: int = 10,
) -> dict[str, Floor]:
    """The four figures between random halves, by group, of real patches: what images without fault would reach."""
    groups, values = np.asarray(groups), []
    for first, second in half_splits(groups, num=num_splits, generator=generator):
        found = neighbourhoods(features[first], features[second], groups=groups[first], real_groups=groups[second])
        values.append([each.mean() for each in found])
    columns = np.array(values).reshape(-1, len(FIGURES)).T
    return {figure: floor_of(column) for figure, column in zip(FIGURES, columns, strict=True)}

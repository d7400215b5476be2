"""Precision, recall, density and coverage: whether images lie where real ones lie, and the other way round.

The neighbourhood of an image is a ball in a network's features, as far as its k-th nearest neighbour. Two images of one
group (patches of a tile, a frame and the patch that it was made from) are not independent, so they are no neighbours:
else a copy of the source would be perfectly precise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.statistics import Groups, half_splits
from cellflux_bridge.metrics.fidelity import Floor, floor_of, group_codes, pair_blocks

# k of precision and recall (Kynkaanniemi et al. 2019), and of density and coverage (Naeem et al. 2020).
NUM_NEIGHBOURS, NUM_NEIGHBOURS_OF_DENSITY = 3, 5


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


FIGURES = Neighbourhoods._fields


def _distance_blocks(x, y, groups_x, groups_y) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, |x_i - y_j|^2 of these rows to all of y) of float64 features; infinite for a pair of one group."""
    # Not 2 (x @ y.T): BLAS rounds x @ x.T by another way, and a copy would not lie as far as its original.
    for rows, doubled, apart in pair_blocks(2 * x, y, groups_x, groups_y):
        squared = (x[rows] ** 2).sum(1)[:, None] + (y**2).sum(1) - doubled
        yield rows, np.where(apart, np.maximum(squared, 0), np.inf)


def _radii(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Squared distances (2, N) to the 3rd and the 5th nearest of another group; infinite where there are fewer."""
    found = np.full((2, len(x)), np.inf)
    for rows, squared in _distance_blocks(x, x, codes, codes):
        for number, k in enumerate((NUM_NEIGHBOURS, NUM_NEIGHBOURS_OF_DENSITY)):
            if k <= len(x):
                found[number, rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return found


def neighbourhoods(
    frames: np.ndarray, real: np.ndarray, *, groups: Groups | None = None, real_groups=None
) -> Neighbourhoods:
    """Neighbourhoods of frames (N, D) and real patches (M, D) among each other; without groups as published."""
    frames, real = np.asarray(frames, np.float64), np.asarray(real, np.float64)
    own, of_real = group_codes(groups, real_groups, len(frames), len(real))
    (balls, _), (real_balls, real_balls_of_density) = _radii(frames, own), _radii(real, of_real)
    precise, dense = np.zeros(len(frames)), np.zeros(len(frames))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, squared in _distance_blocks(frames, real, own, of_real):
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
    features: np.ndarray, groups: Groups, *, generator: np.random.Generator, num_splits: int = 10
) -> dict[str, Floor]:
    """The four figures between random halves, by group, of real patches: perfect images would reach them."""
    groups, values = np.asarray(groups), []
    for first, second in half_splits(groups, num=num_splits, generator=generator):
        found = neighbourhoods(features[first], features[second], groups=groups[first], real_groups=groups[second])
        values.append([each.mean() for each in found])
    columns = np.array(values).reshape(-1, len(FIGURES)).T
    return {figure: floor_of(column) for figure, column in zip(FIGURES, columns, strict=True)}

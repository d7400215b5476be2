"""Two sets of images in the features of a network: kernel and Frechet distance, precision, recall, density, coverage.

Features (N, D) of any float type. Values of different feature extractors are never comparable.

Two images of one group (patches of a tile, a frame and the patch that it was made from) are not independent. Pairs of
one group count in no mean kernel, and are no neighbours: else a copy of the source would be perfectly precise.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, svdvals

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import COVERAGE, Estimate, Groups, half_splits

_BLOCK = 512  # rows of pairs at a time
# k of precision and recall (Kynkaanniemi et al. 2019), and of density and coverage (Naeem et al. 2020).
NUM_NEIGHBOURS, NUM_NEIGHBOURS_OF_DENSITY = 3, 5


class Floor(NamedTuple):
    """A distance of real to real patches: mean, standard deviation and 95 % range over random splits."""

    mean: float
    spread: float
    low: float
    high: float


def require_finite(features: np.ndarray, *, name: str) -> None:
    """UserError where a feature of (N, D) is not a finite number."""
    if wrong := (~np.isfinite(features)).any(axis=1).sum():
        raise UserError(
            f"{name}: {wrong} of {len(features)} images have features or probabilities that are not finite numbers; "
            "the network has diverged, train it again or name another"
        )


def group_codes(groups_a, groups_b, num_a: int, num_b: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sets' group names as numbers; where none are given every item of either set is a group of its own."""
    if groups_a is None:
        return np.arange(num_a), num_a + np.arange(num_b)
    _, numbers = np.unique(np.concatenate([np.asarray(groups_a), np.asarray(groups_b)]), return_inverse=True)
    return numbers[:num_a], numbers[num_a:]


def pair_blocks(x, y, groups_x, groups_y) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, x_i . y_j of these rows with all of y, whether their groups differ), in memory linear in `len(y)`."""
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        yield rows, x[rows] @ y.T, groups_x[rows, None] != groups_y


def _mean_kernel(x, y, groups_x, groups_y, chosen_x, chosen_y) -> np.ndarray:
    """Mean of (x.y / D + 1)^3 over pairs of different groups, within each of S subsets.

    x (N, D), y (M, D); `chosen_x` (N, S) and `chosen_y` (M, S) are 1 where an item belongs to a subset. Returns (S,).
    """
    totals, counts = np.zeros((2, chosen_x.shape[1]))
    for rows, products, apart in pair_blocks(x, y, groups_x, groups_y):
        kernel = (products / x.shape[1] + 1) ** 3
        totals += ((kernel * apart) @ chosen_y * chosen_x[rows]).sum(0)
        counts += (apart.astype(np.float64) @ chosen_y * chosen_x[rows]).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals / counts  # NaN where there is no pair


def _membership(num_items: int, subsets: Sequence[np.ndarray]) -> np.ndarray:
    """(N, S): 1 where an item belongs to a subset, which is an array of indices."""
    chosen = np.zeros((num_items, len(subsets)))
    for column, subset in enumerate(subsets):
        chosen[subset, column] = 1
    return chosen


def _subsets(groups: np.ndarray, *, num: int, generator: np.random.Generator | None) -> np.ndarray:
    """(N, 1 + num): all items, then halves of the groups drawn without replacement."""
    halves = half_splits(groups, num=num, generator=generator) if num else []
    return _membership(len(groups), [np.arange(len(groups)), *(half for half, _ in halves)])


def kid(features_a: np.ndarray, features_b: np.ndarray, **options) -> Estimate:
    """`kid_by_level` of one set of features (N, D)."""
    return kid_by_level(np.asarray(features_a)[:, None], features_b, **options)[0]


def kid_by_level(
    frames: np.ndarray,
    real: np.ndarray,
    *,
    groups: Groups | None = None,
    real_groups: Groups | None = None,
    num_subsamples: int = 0,
    generator: np.random.Generator | None = None,
) -> list[Estimate]:
    """Kernel distance of Binkowski et al. (2018), unbiased MMD^2 with the kernel (x.y / D + 1)^3, on all samples, of
    each of the L levels of `frames` (N, L, D) to `real` (M, D).

    The expectation is 0 for two sets of one distribution, so a value may be negative. Without groups only an item's
    pair with itself is left out, as published. Memory is linear in the numbers of images.

    The interval is the basic one (value - high, value - low of the deviations) over `num_subsamples` draws of half of
    the groups of either set without replacement: the deviation of such a half spreads as widely as the error of the
    whole (delete-half jackknife, Shao & Wu 1989). It is NaN without subsamples and for fewer than four groups; the
    value is NaN for fewer than two.
    """
    frames, real = np.asarray(frames, np.float64), np.asarray(real, np.float64)
    own, of_real = group_codes(groups, real_groups, len(frames), len(real))
    fewest = min(len(np.unique(own)), len(np.unique(of_real)))
    num = num_subsamples if fewest >= 4 else 0
    chosen, chosen_real = (_subsets(codes, num=num, generator=generator) for codes in (own, of_real))
    within_real = _mean_kernel(real, real, of_real, of_real, chosen_real, chosen_real)
    results = []
    for level in frames.swapaxes(0, 1):
        within = _mean_kernel(level, level, own, own, chosen, chosen)
        across = _mean_kernel(level, real, own, of_real, chosen, chosen_real)
        value, *drawn = within + within_real - 2 * across
        low, high = np.percentile(np.array(drawn) - value, COVERAGE) if num else (np.nan, np.nan)
        results.append(Estimate(float(value), float(value - high), float(value - low)))
    return results


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the distance of FID (Heusel et al. 2017) in any features.

    The trace of the root is the sum of the singular values of A B^T, where A^T A = C_a and B^T B = C_b: with fewer
    images than features A and B are the centred features themselves, otherwise symmetric roots. The distance is biased
    upward at small n: state n, and compare only values of the same n. NaN where a set has fewer than two images.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(a), len(b)) < 2:
        return float("nan")
    (root_a, trace_a), (root_b, trace_b) = map(_covariance_root, (a, b))
    mean = a.mean(0) - b.mean(0)
    apart = mean @ mean + trace_a + trace_b - 2 * svdvals(root_a @ root_b.T).sum()
    return max(0.0, float(apart))  # rounding alone takes it below


def _covariance_root(features: np.ndarray) -> tuple[np.ndarray, float]:
    """A matrix A with A^T A = C, the covariance of features (N, D), and the trace of C."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    trace = float(np.square(centred).sum())
    if len(centred) <= centred.shape[1]:
        return centred, trace
    values, vectors = eigh(centred.T @ centred)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T, trace


def kid_floor(features: np.ndarray, groups: Groups, *, generator: np.random.Generator, num_splits: int = 100) -> Floor:
    """`kid` between random halves, by group, of the real patches.

    Its mean is 0 in expectation and may be negative. Single splits are skewed upward, most where the patches are of two
    kinds. Compare a difference to the mean with `spread`.
    """
    x, (names, codes) = np.asarray(features, np.float64), np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 4:
        return floor_of(np.empty(0))
    first = _membership(len(x), [half for half, _ in half_splits(groups, num=num_splits, generator=generator)])
    within = sum(_mean_kernel(x, x, codes, codes, half, half) for half in (first, 1 - first))
    return floor_of(within - 2 * _mean_kernel(x, x, codes, codes, first, 1 - first))


def frechet_floor(
    features: np.ndarray, groups: Groups, *, generator: np.random.Generator, num_splits: int = 20
) -> Floor:
    """`frechet_distance` between random halves, by group: of half as many images, so larger than of all."""
    splits = half_splits(groups, num=num_splits, generator=generator)
    return floor_of(np.array([frechet_distance(features[first], features[second]) for first, second in splits]))


def floor_of(values: np.ndarray) -> Floor:
    """The floor of a distance from its values over random splits; NaN where one of them does not exist."""
    if len(values) == 0 or not np.isfinite(values).all():
        return Floor(*(float("nan"),) * 4)
    return Floor(*map(float, (values.mean(), values.std(ddof=1), *np.percentile(values, COVERAGE))))


class Neighbourhoods(NamedTuple):
    """The items whose means are the four figures; all NaN where an image has fewer than k of another group beside it.
    A neighbourhood is a ball in the features, as far as the k-th nearest neighbour.

    precision (N,)  1 for a frame inside the ball of a real patch, else 0
    recall (M,)     1 for a real patch inside the ball of a frame
    density (N,)    in how many real patches' balls a frame lies, over k; its mean is not bounded by 1
    coverage (M,)   1 for a real patch whose ball holds a frame
    """

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray


NEIGHBOURHOOD_FIGURES = Neighbourhoods._fields


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
    columns = np.array(values).reshape(-1, len(NEIGHBOURHOOD_FIGURES)).T
    return {figure: floor_of(column) for figure, column in zip(NEIGHBOURHOOD_FIGURES, columns, strict=True)}

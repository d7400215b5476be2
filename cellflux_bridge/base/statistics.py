"""Intervals and paired tests over sources whose patches come in groups (a slide, a patient, an original tile).

Patches of one group are not independent, so groups are drawn, never single patches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, wilcoxon

Groups = Sequence[str] | np.ndarray  # the group of each item
COVERAGE = (2.5, 97.5)  # percentiles of every interval
NUM_RESAMPLES = 1000  # draws of every bootstrap


class Estimate(NamedTuple):
    """A value and its 95 % interval; floats, or arrays of one shape."""

    value: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float


class Paired(NamedTuple):
    """The mean difference of paired values with its 95 % interval; `p` of Wilcoxon's test over `num_groups` means."""

    difference: float
    low: float
    high: float
    p: float
    num_groups: int


def _members(groups: Groups) -> list[np.ndarray]:
    """The indices of each group's items, groups in the order of their names."""
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])


class Resamples(NamedTuple):
    """Draws of N items, each an array of indices into them."""

    num_items: int
    draws: list[np.ndarray]


def bootstrap(groups: Groups, *, num: int, generator: np.random.Generator) -> Resamples:
    """`num` resamples of items by whole groups, drawn with replacement (the cluster bootstrap)."""
    members = _members(groups)
    drawn = generator.integers(len(members), size=(num, len(members)))
    return Resamples(len(groups), [np.concatenate([members[g] for g in draw]) for draw in drawn])


def estimate(statistic: Callable[[np.ndarray], np.ndarray | float], resamples: Resamples) -> Estimate:
    """`statistic` of all items, given by their indices, with the percentile interval of its values on the resamples."""
    value = statistic(np.arange(resamples.num_items))
    drawn = np.stack([np.asarray(statistic(indices), dtype=np.float64) for indices in resamples.draws])
    low, high = np.percentile(drawn, COVERAGE, axis=0)
    return Estimate(value, low, high)


def estimate_mean(values: np.ndarray, groups: Groups, *, num: int, generator: np.random.Generator) -> Estimate:
    """The mean of values (N,) as `estimate` gives it on `bootstrap`, with one draw at a time in memory; NaN where there
    is no value."""
    if len(values) == 0:
        return Estimate(*(float("nan"),) * 3)
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(numbers, values), np.bincount(numbers)
    draws = (generator.integers(len(sums), size=len(sums)) for _ in range(num))
    low, high = np.percentile([sums[draw].sum() / counts[draw].sum() for draw in draws], COVERAGE)
    return Estimate(float(np.mean(values)), float(low), float(high))


def half_splits(groups: Groups, *, num: int, generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """`num` random divisions of the items into two halves, every group whole in one of them; one group gives none."""
    members = _members(groups)
    if len(members) < 2:
        return []
    orders = [generator.permutation(len(members)) for _ in range(num)]
    halves = ((order[: len(members) // 2], order[len(members) // 2 :]) for order in orders)
    return [tuple(np.concatenate([members[g] for g in half]) for half in pair) for pair in halves]


def paired_difference(first: np.ndarray, second: np.ndarray, groups: Groups, *, resamples: Resamples) -> Paired:
    """The mean of first - second, both (N,) and of the same N sources, with its interval on `bootstrap(groups)`.

    p is that of Wilcoxon's signed-rank test on the means of the groups; 1 where no group differs.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    value, low, high = estimate(lambda chosen: differences[chosen].mean(), resamples)
    of_groups = np.array([differences[items].mean() for items in _members(groups)])
    p = float(wilcoxon(of_groups).pvalue) if np.any(of_groups != 0) else 1.0
    return Paired(float(value), float(low), float(high), p, len(of_groups))


def rank_correlation(values: np.ndarray, levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """Spearman's correlation (N,) of values (N, K) with the levels (K,), over the levels where a value is finite.

    A sequence whose values never change has no rank of its levels: 0. One with fewer than three values: NaN.
    """
    found = np.full(len(values), np.nan)
    for number, own in enumerate(values):
        finite = np.isfinite(own)
        if finite.sum() >= 3:
            one, other = rankdata(own[finite]), rankdata(np.asarray(levels)[finite])
            found[number] = 0.0 if np.ptp(one) == 0 else np.corrcoef(one, other)[0, 1]
    return found

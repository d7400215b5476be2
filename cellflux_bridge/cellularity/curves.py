"""Statistics of nuclei over the levels of a Trajectory, beside real patches of both classes.

Patches of one group (slide, patient, original tile) are not independent, so every interval is drawn over groups.
Results are rows (dictionaries) of cellularity.json; `export` lists their keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import (
    NUM_RESAMPLES,
    Estimate,
    bootstrap,
    estimate,
    estimate_mean,
    rank_correlation,
)
from cellflux_bridge.cellularity.measurement import MIN_PIXELS, OF_SINGLE_NUCLEI, QUANTITIES
from cellflux_bridge.data.patches import near_level

REACHED, MISSED, UNDECIDED = "reached", "missed", "undecided"
Row = dict[str, Any]


class Counted(NamedTuple):
    """Nuclei of N sources (or real patches): `values` (N, K, Q) in the order of `QUANTITIES`, NaN where a quantity does
    not exist; `groups` (N,); the median over all images of the nuclei's median area, in px."""

    values: np.ndarray
    groups: np.ndarray
    median_area: float

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], groups: Sequence[str]) -> "Counted":
        """From the rows (K, 1 + Q) of `count_arrays`."""
        table = np.stack(rows)
        areas = table[..., 0][np.isfinite(table[..., 0])]
        return cls(table[..., 1:], np.asarray(groups), float(np.median(areas)) if len(areas) else np.nan)

    def at(self, quantity: str, level: int) -> np.ndarray:
        """(N,) values of a quantity at a level's number."""
        return self.values[:, level, QUANTITIES.index(quantity)]

    def mean(self, quantity: str, level: int = 0) -> float:
        """The mean of the values that exist; NaN without any."""
        values = self.at(quantity, level)
        return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else np.nan

    def split_by_size(self) -> tuple[list[str], list[str]]:
        """The quantities that exist in these images and can be trusted, and those refused because the nuclei are too
        small to be told apart."""
        exist = [name for q, name in enumerate(QUANTITIES) if np.isfinite(self.values[..., q]).any()]
        refused = [name for name in exist if name in OF_SINGLE_NUCLEI and self.median_area < MIN_PIXELS]
        return [name for name in exist if name not in refused], refused

    def require_some(self, *, of: str) -> None:
        """UserError, naming what these images are, where nuclei could be sought in none of the first level."""
        if np.isnan(self.values[:, 0]).all():
            raise UserError(
                f"{of}: all {len(self.values)} are grey, dark or inverted; expected bright-field H&E in colour"
            )


class Scored(NamedTuple):
    """Nuclei of N real patches of known scores, K = 1, and their scores (N,) towards the target."""

    counted: Counted
    scores: np.ndarray

    def of_level(self, level: float) -> Counted:
        chosen = near_level(self.scores, level)
        return self.counted._replace(values=self.counted.values[chosen], groups=self.counted.groups[chosen])


def _mean_row(values: np.ndarray, groups: np.ndarray, *, seed: int, purpose: str, key: str) -> Row:
    """`n` finite values among (N,), their mean under `key`, and its interval over groups."""
    finite = np.isfinite(values)
    generator = numpy_generator(seed, "cellularity", purpose)
    found = estimate_mean(values[finite], groups[finite], num=NUM_RESAMPLES, generator=generator)
    return {"n": int(finite.sum()), key: found.value, "low": found.low, "high": found.high}


def means(
    counted: Counted, levels: Sequence[float | None], *, seed: int, errors: Mapping[str, float] | None = None
) -> list[Row]:
    """The mean of every trusted quantity at each of K levels.

    Its interval is that of the sources, and of the counter where `errors` has its relative standard error: the two half
    widths are added in quadrature.
    """
    options, errors = {"seed": seed, "purpose": "mean", "key": "mean"}, errors or {}
    rows = []
    for name in counted.split_by_size()[0]:
        for k, level in enumerate(levels):
            row = _mean_row(counted.at(name, k), counted.groups, **options)
            rows.append({"quantity": name, "level": level, **_widened(row, errors.get(name, 0.0))})
    return rows


def _widened(row: Row, error: float) -> Row:
    """A row of `_mean_row` whose 95 % interval takes in a relative standard error of the mean."""
    if not error or not np.isfinite(row["mean"]):
        return row
    mean, of_counter = row["mean"], 1.96 * error * row["mean"]
    low, high = mean - np.hypot(mean - row["low"], of_counter), mean + np.hypot(row["high"] - mean, of_counter)
    return row | {"low": float(max(0.0, low)), "high": float(high)}


def correlations(counted: Counted, levels: Sequence[float], *, seed: int) -> list[Row]:
    """The mean over sources of Spearman's correlation of every trusted quantity with the level."""
    options = {"seed": seed, "purpose": "spearman", "key": "value"}
    return [
        {
            "quantity": name,
            **_mean_row(
                rank_correlation(counted.values[:, :, QUANTITIES.index(name)], levels), counted.groups, **options
            ),
        }
        for name in counted.split_by_size()[0]
    ]


def verdict(gap: Estimate, *, of_source: float) -> str:
    """What the interval of (last level - real target) says; `of_source` is (real source - real target).

    Missed: the interval excludes 0. Reached: it includes 0 and excludes the source's difference, so the last level
    differs from unchanged sources. Undecided: it includes both, or one of the numbers does not exist.
    """
    if not np.isfinite([*gap, of_source]).all():
        return UNDECIDED
    if not gap.low <= 0 <= gap.high:
        return MISSED
    return UNDECIDED if gap.low <= of_source <= gap.high else REACHED


def checks(
    counted: Counted, levels: Sequence[float], source: Counted, target: Counted, scored: Scored | None, *, seed: int
) -> list[Row]:
    """A trajectory's curves against real patches (K = 1 each): of the source class, the target class, known scores.

    One row for each quantity that exists and can be trusted in all three; a number that does not exist is NaN.
    """
    trusted = [of.split_by_size()[0] for of in (counted, source, target)]
    rows = []
    for name in (name for name in trusted[0] if all(name in others for others in trusted[1:])):
        gap = _gap(counted, target, name, seed=seed)
        ends = source.mean(name), target.mean(name)
        inner = np.array([counted.mean(name, k) for k in range(1, len(levels) - 1)])
        inner = inner[np.isfinite(inner)]
        real = [np.nan if scored is None else scored.of_level(level).mean(name) for level in levels]
        distances = np.array([abs(counted.mean(name, k) - mean) for k, mean in enumerate(real)])
        distances = distances[np.isfinite(distances)]
        rows.append(
            {
                "quantity": name,
                "end_minus_target": float(gap.value),
                "low": float(gap.low),
                "high": float(gap.high),
                "end": verdict(gap, of_source=ends[0] - ends[1]),
                "n_inner": len(inner),
                "inner_between": float(np.mean((inner >= min(ends)) & (inner <= max(ends)))) if len(inner) else None,
                "n_scored": len(distances),
                "distance_to_real": float(np.mean(distances)) if len(distances) else None,
            }
        )
    return rows


def _gap(counted: Counted, target: Counted, name: str, *, seed: int) -> Estimate:
    """The mean at the last level less that of real target patches; NaN where one of both has no such quantity.

    One bootstrap resamples both sides together, because a real patch may be of a source's group.
    """
    values = np.concatenate([counted.at(name, -1), target.at(name, 0)])
    groups = np.concatenate([counted.groups, target.groups])
    is_end = np.arange(len(values)) < len(counted.values)
    finite = np.isfinite(values)
    values, groups, is_end = values[finite], groups[finite], is_end[finite]
    if not 0 < is_end.sum() < len(is_end):
        return Estimate(np.nan, np.nan, np.nan)
    resamples = bootstrap(groups, num=NUM_RESAMPLES, generator=numpy_generator(seed, "cellularity", "end"))
    with_both = resamples._replace(draws=[d for d in resamples.draws if 0 < is_end[d].sum() < len(d)])

    def difference(chosen: np.ndarray) -> float:
        return values[chosen][is_end[chosen]].mean() - values[chosen][~is_end[chosen]].mean()

    return estimate(difference, with_both)

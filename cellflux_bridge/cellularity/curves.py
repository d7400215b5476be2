"""Nuclei along a Trajectory: each quantity's curve over the level, beside the real patches of both classes.

Patches of one group (slide, patient, original tile) are not independent, so every interval is drawn over groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import (
    NUM_RESAMPLES,
    Estimate,
    bootstrap,
    estimate,
    estimate_mean,
    rank_correlation,
)
from cellflux_bridge.cellularity.counting import count_arrays
from cellflux_bridge.cellularity.measurement import MIN_PIXELS, OF_SINGLE_NUCLEI, QUANTITIES
from cellflux_bridge.cellularity.nuclei import Parameters
from cellflux_bridge.data.patches import near_level
from cellflux_bridge.trajectory import TrajectoryHeader, count_incomplete, iter_trajectory, read_header

REACHED, MISSED, UNDECIDED = "reached", "missed", "undecided"


class Counted(NamedTuple):
    """What was counted in N sources (or real patches): `values` (N, K, Q) in the order of `QUANTITIES`, NaN where a
    quantity does not exist; `groups` (N,); the median over all images of the nuclei's median area, in px."""

    values: np.ndarray
    groups: np.ndarray
    median_area: float

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], groups: Sequence[str]) -> "Counted":
        table = np.stack(rows)
        areas = table[..., 0]
        median_area = float(np.median(areas[np.isfinite(areas)])) if np.isfinite(areas).any() else np.nan
        return cls(table[..., 1:], np.asarray(groups), median_area)

    @property
    def tells_nuclei_apart(self) -> bool:
        return not self.median_area < MIN_PIXELS

    def require_some(self, level: int, *, of: str) -> None:
        """UserError, naming what these images are, where nuclei could be sought in none of a level's."""
        if np.isnan(self.values[:, level]).all():
            raise UserError(
                f"{of}: all {len(self.values)} are grey, dark or inverted; expected bright-field H&E in colour"
            )


class Scored(NamedTuple):
    """What was counted in N real patches of known scores, K = 1, and their scores (N,) towards the target."""

    counted: Counted
    scores: np.ndarray

    def of_level(self, level: float) -> Counted:
        chosen = near_level(self.scores, level)
        return self.counted._replace(values=self.counted.values[chosen], groups=self.counted.groups[chosen])

    def points(self, levels: Sequence[float], *, seed: int) -> "tuple[Point, ...]":
        """The mean of every quantity over the patches of each level that has any."""
        found = (points(self.of_level(level), [level], seed=seed) for level in levels)
        return tuple(point for of_level in found for point in of_level)


class Point(NamedTuple):
    """The mean of a quantity over `n` images that have it, at a level or of a class, with its 95 % interval."""

    quantity: str
    level: float | None
    n: int
    mean: float
    low: float
    high: float


class Correlation(NamedTuple):
    """Mean over `n` sources of Spearman's correlation of a quantity with the level, with its 95 % interval."""

    quantity: str
    n: int
    value: float
    low: float
    high: float


class Check(NamedTuple):
    """How a curve ends and runs, against real patches of both classes.

    `end_minus_target` is the mean at the last level less that of real target patches, with its 95 % interval (both
    sides resampled), and `end` what that tells (`verdict`). `inner_between` is the share of the `n_inner` inner levels
    whose mean lies between the two classes' means; None without inner levels. Where real patches have scores,
    `distance_to_real` is the mean over the `n_scored` levels that such patches exist of, of the distance between the
    curve and the mean of real patches of the level; else None.
    """

    quantity: str
    end_minus_target: float
    low: float
    high: float
    end: str
    n_inner: int
    inner_between: float | None
    n_scored: int
    distance_to_real: float | None


@dataclass(frozen=True)
class Curves:
    """One trajectory's curves. `incomplete` sequences lack rows in the manifest and were left out; `unmeasured` frames
    were grey or inverted; `refused` quantities need larger nuclei."""

    folder: Path
    header: TrajectoryHeader
    source_ids: tuple[str, ...]
    counted: Counted
    curves: tuple[Point, ...]
    spearman: tuple[Correlation, ...]
    checks: tuple[Check, ...]
    incomplete: int
    unmeasured: int
    refused: tuple[str, ...]


def count_trajectory(
    folder: Path, groups: dict[str, str], *, mpp: float | None, parameters: Parameters, workers: int
) -> tuple[tuple[str, ...], Counted]:
    """The source ids of a trajectory folder, and what was counted in all frames; `groups` by source id, a source
    that is not among them is a group of its own. Frames are read as they are counted."""
    ids: list[str] = []

    def sequences() -> Iterator[np.ndarray]:
        for batch in iter_trajectory(folder, batch_size=16):
            ids.extend(batch.source_ids)
            yield from (batch.sequence(b) for b in range(len(batch.source_ids)))

    counted = count_arrays(sequences(), mpp=mpp, parameters=parameters, workers=workers)
    rows = list(progress(counted, desc=f"nuclei of {folder.name}", unit="sequence"))
    if not rows:
        raise UserError(f"{folder}: no whole sequence to count in; let `cellflux-bridge translate` finish first")
    found = Counted.of(rows, [groups.get(source, source) for source in ids])
    found.require_some(0, of=f"{folder}: its sources")
    return tuple(ids), found


def _existing(counted: Counted) -> tuple[list[str], tuple[str, ...]]:
    """Quantities that exist in these images, and those that are refused because the nuclei are too small."""
    exist = [name for q, name in enumerate(QUANTITIES) if np.isfinite(counted.values[..., q]).any()]
    refused = () if counted.tells_nuclei_apart else tuple(name for name in exist if name in OF_SINGLE_NUCLEI)
    return [name for name in exist if name not in refused], refused


def _mean_of(values: np.ndarray, groups: np.ndarray, *, seed: int, purpose: str) -> tuple[int, Estimate]:
    """The number of finite values among (N,), and their mean with its interval over groups."""
    finite = np.isfinite(values)
    generator = numpy_generator(seed, "cellularity", purpose)
    return int(finite.sum()), estimate_mean(values[finite], groups[finite], num=NUM_RESAMPLES, generator=generator)


def points(counted: Counted, levels: Sequence[float | None], *, seed: int) -> tuple[Point, ...]:
    """The mean of every quantity at each of K levels, refused quantities left out."""
    return tuple(
        Point(
            name,
            level,
            *_flat(_mean_of(counted.values[:, k, QUANTITIES.index(name)], counted.groups, seed=seed, purpose="mean")),
        )
        for name in _existing(counted)[0]
        for k, level in enumerate(levels)
    )


def _flat(found: tuple[int, Estimate]) -> tuple[int, float, float, float]:
    return found[0], *found[1]


def correlations(counted: Counted, levels: Sequence[float], *, seed: int) -> tuple[Correlation, ...]:
    """Spearman's correlation with the level of every quantity that is not refused."""
    each = ((name, counted.values[:, :, QUANTITIES.index(name)]) for name in _existing(counted)[0])
    by_source = ((name, rank_correlation(values, levels)) for name, values in each)
    return tuple(
        Correlation(name, *_flat(_mean_of(rho, counted.groups, seed=seed, purpose="spearman")))
        for name, rho in by_source
    )


def verdict(gap: Estimate, *, of_source: float) -> str:
    """What the interval of an end's difference to the target says; `of_source` is that of real source patches.

    Missed: it leaves out 0. Reached: it holds 0 and leaves out the source's difference, so the end is told from having
    changed nothing. Undecided: it holds both, or nothing was measured.
    """
    if not np.isfinite([*gap, of_source]).all():
        return UNDECIDED
    if not gap.low <= 0 <= gap.high:
        return MISSED
    return UNDECIDED if gap.low <= of_source <= gap.high else REACHED


def checks(
    counted: Counted, levels: Sequence[float], source: Counted, target: Counted, scored: Scored | None, *, seed: int
) -> tuple[Check, ...]:
    """The curves of a trajectory against real patches, all with K = 1: of source, of target, and of known scores."""
    common = [name for name in _existing(counted)[0] if all(name in _existing(real)[0] for real in (source, target))]
    found = []
    for name in common:
        q = QUANTITIES.index(name)
        end, goal = counted.values[:, -1, q], target.values[:, 0, q]
        finite_end, finite_goal = np.isfinite(end), np.isfinite(goal)
        # One bootstrap of both: a real patch may be of a source's group.
        joined = np.concatenate([end[finite_end], goal[finite_goal]])
        is_end = np.arange(len(joined)) < finite_end.sum()
        groups = np.concatenate([counted.groups[finite_end], target.groups[finite_goal]])
        resamples = bootstrap(groups, num=NUM_RESAMPLES, generator=numpy_generator(seed, "cellularity", "end"))

        def difference(chosen: np.ndarray, joined: np.ndarray = joined, is_end: np.ndarray = is_end) -> float:
            values, ends = joined[chosen], is_end[chosen]
            return values[ends].mean() - values[~ends].mean() if 0 < ends.sum() < len(ends) else np.nan

        gap = estimate(difference, _with_both(resamples, is_end))
        means = np.array([_finite_mean(counted.values[:, k, q]) for k in range(1, counted.values.shape[1] - 1)])
        low, high = sorted((_finite_mean(source.values[:, 0, q]), _finite_mean(goal)))
        inner = None if not len(means) else float(np.mean((means >= low) & (means <= high)))
        end = verdict(gap, of_source=_finite_mean(source.values[:, 0, q]) - _finite_mean(goal))
        distances = [] if scored is None else _distances_to_real(counted, levels, scored, q)
        distance = float(np.mean(distances)) if distances else None
        found.append(Check(name, *map(float, gap), end, len(means), inner, len(distances), distance))
    return tuple(found)


def _distances_to_real(counted: Counted, levels: Sequence[float], scored: Scored, q: int) -> list[float]:
    means = (
        (_finite_mean(counted.values[:, k, q]), _finite_mean(scored.of_level(level).values[:, 0, q]))
        for k, level in enumerate(levels)
    )
    return [abs(own - real) for own, real in means if np.isfinite(own) and np.isfinite(real)]


def _with_both(resamples, is_end: np.ndarray):
    """The resamples that hold frames and real patches."""
    return resamples._replace(draws=[d for d in resamples.draws if 0 < is_end[d].sum() < len(d)])


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def curves_of(
    folder: Path,
    groups: dict[str, str],
    real: tuple[Counted, Counted] | None,
    scored: Scored | None,
    *,
    mpp: float | None,
    parameters: Parameters,
    seed: int,
    workers: int,
) -> Curves:
    """Everything that is known of one trajectory folder; `real` are patches of its source and its target class,
    `scored` those of known scores."""
    header = read_header(folder)
    ids, counted = count_trajectory(folder, groups, mpp=mpp, parameters=parameters, workers=workers)
    return Curves(
        folder=folder,
        header=header,
        source_ids=ids,
        counted=counted,
        curves=points(counted, header.levels, seed=seed),
        spearman=correlations(counted, header.levels, seed=seed),
        checks=() if real is None else checks(counted, header.levels, *real, scored, seed=seed),
        incomplete=count_incomplete(folder),
        unmeasured=int(np.isnan(counted.values[..., QUANTITIES.index("area_fraction")]).sum()),
        refused=_existing(counted)[1],
    )

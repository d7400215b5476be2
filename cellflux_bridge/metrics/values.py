"""The long form of all figures: one row a value, with its subject, its network, and the number of images behind it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.statistics import Estimate, Resamples, estimate
from cellflux_bridge.metrics.networks import Network


class Value(NamedTuple):
    """One figure with its 95 % interval. `level` is None for the whole sequence, `extractor` "" where no network is
    needed; `n` counts sequences or images, `n_real` the real test patches they are compared to. `split` is that of the
    sources, or of the real patches that the value is of: "test" or "val", both, or "" for sources in no split."""

    trajectory: str
    method: str
    quantity: str
    level: float | None
    extractor: str
    n: int
    n_real: int | None
    split: str
    value: float
    low: float
    high: float


class Recorder(NamedTuple):
    """Appends to `rows` figures of one subject: `n` sequences of a method or baseline, or `n` real patches.

    `levels` (K,) are those after the source; `resamples` of the sequences give intervals.
    """

    rows: list[Value]
    name: str
    n: int
    trajectory: str = ""
    levels: tuple[float, ...] = ()
    split: str = "test"
    resamples: Resamples | None = None

    def __call__(
        self, quantity: str, figure: np.ndarray | Callable[[np.ndarray], np.ndarray | float], **options
    ) -> None:
        """The mean of an array (N, ...) over the sequences, or a statistic of chosen sequences, with its interval."""
        statistic = figure if callable(figure) else lambda chosen: figure[chosen].mean(0)
        self.add(quantity, estimate(statistic, self.resamples), **options)

    def add(
        self,
        quantity: str,
        found: Estimate | float | list[Estimate],
        *,
        level: float | None = None,
        by: Network | None = None,
        n_real: int | None = None,
    ) -> None:
        """A value; a plain number has no interval. A list, or an Estimate of arrays, has a value a level, the source's
        first where there is one more."""
        if isinstance(found, Estimate) and np.ndim(found.value):
            found = [Estimate(*one) for one in zip(*found, strict=True)]
        if isinstance(found, list):
            for own_level, one in zip((0.0, *self.levels)[-len(found) :], found, strict=True):
                self.add(quantity, one, level=own_level, by=by, n_real=n_real)
            return
        subject = (self.trajectory, self.name, quantity, level, by.name if by else "", self.n, n_real, self.split)
        numbers = found if isinstance(found, Estimate) else (found, np.nan, np.nan)
        self.rows.append(Value(*subject, *map(float, numbers)))

"""The long form in which all figures are kept: one row a value, with what it is of, by whom, and from how many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.statistics import Estimate
from cellflux_bridge.metrics.networks import Network


class Value(NamedTuple):
    """One figure. `level` is None where it belongs to the whole sequence; `extractor` "" where no network is asked;
    `n` sequences or images, `n_real` the real patches they are compared to; `low` and `high` a 95 % interval. `split`
    is that of the sources, or of the real patches that the value is of: "test" or "val", both, or "" for sources that
    are in no split; what they are compared to is always of the test split."""

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


class Subject(NamedTuple):
    """What values are of: a method's or a baseline's sequences, or a set of real patches; `levels` (K,). `split` as in
    `Value`."""

    name: str
    n: int
    folder: Path | None = None
    levels: tuple[float, ...] = ()
    split: str = "test"


class Values:
    """Collects rows."""

    def __init__(self):
        self.rows: list[Value] = []

    def add(
        self,
        of: Subject,
        quantity: str,
        found: Estimate | float,
        *,
        level: float | None = None,
        by: Network | None = None,
        n_real: int | None = None,
    ) -> None:
        """One value; a plain number has no interval."""
        numbers = found if isinstance(found, Estimate) else (found, np.nan, np.nan)
        folder, extractor = str(of.folder or ""), "" if by is None else by.name
        row = Value(folder, of.name, quantity, level, extractor, of.n, n_real, of.split, *map(float, numbers))
        self.rows.append(row)

    def add_levels(
        self,
        of: Subject,
        quantity: str,
        found: Estimate | Sequence[Estimate],
        *,
        by: Network | None = None,
        n_real: int | None = None,
    ) -> None:
        """A value a level: an estimate of arrays or as many estimates, for all levels with the source or without."""
        each = [Estimate(*one) for one in zip(*found, strict=True)] if isinstance(found, Estimate) else found
        levels = (0.0, *of.levels)[-len(each) :]
        for level, one in zip(levels, each, strict=True):
            self.add(of, quantity, one, level=level, by=by, n_real=n_real)

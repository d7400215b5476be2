"""Made treated cells beside real ones: CellFlux's protocol, with floors, intervals and numbers of cells.

FIDo and KIDo compare all cells of all perturbations at once; FIDc and KIDc are means over perturbations (CellFlux, ICML
2025). Features decide the values: compare only values of the same features and the same numbers of cells. KID is the
unbiased estimate on all cells, whose expectation is that of the mean over subsets that torchmetrics draws.

Real training cells of the same perturbations, in the same numbers, go through everything as a method does: they are
what perfect cells would reach. So do the controls themselves, which are what no treatment would reach.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import COVERAGE, NUM_RESAMPLES, Estimate, estimate_mean
from cellflux_bridge.images.fluorescence import measure_nuclei
from cellflux_bridge.metrics.bands import band_statistics
from cellflux_bridge.metrics.fidelity import frechet_distance, kid

# A perturbation with fewer cells on either side enters no mean over perturbations.
FEWEST = 5
_NUM_HALVES = 100
_QUANTILES = (1, 25, 50, 75, 99)
_CHUNK = 1024
_MOST_SPREADS = 5.0
# Of a perturbation's number and a dose, the effect on each quantity.
Effects = dict[tuple[int, str], np.ndarray]
# The row of the real test cells, of which only what is told has a meaning.
TEST = "real test cells"
# What is measured: of the nucleus nearest to the middle of a cell's image, and how many nuclei it shows.
QUANTITIES = ("nuclear area", "nuclear intensity", "number of nuclei")


class Row(NamedTuple):
    """A figure of a method: of "seen" or "unseen" perturbations, by some features; `num` are cells, or perturbations
    where the figure is over these."""

    method: str
    perturbations: str
    figure: str
    by: str
    estimate: Estimate
    num: int


@dataclass(frozen=True)
class Cells:
    """N cells: images (N, C, H, W) uint8, the numbers (N,) int64 of their perturbations and batches (-1: none), doses
    (N,) float32 (0: none), and `origins` (N,), the numbers of the real cells that they are or are made from: cells of
    one origin are not independent."""

    images: np.ndarray
    labels: np.ndarray
    batches: np.ndarray
    doses: np.ndarray
    origins: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def at(self, chosen: np.ndarray) -> "Cells":
        features = {name: values[chosen] for name, values in self.features.items()}
        columns = (self.images, self.labels, self.batches, self.doses, self.origins)
        return Cells(*(column[chosen] for column in columns), features)

    def first(self, counts: Mapping[int, int]) -> "Cells":
        """At most so many cells of each perturbation, the first ones."""
        chosen = [np.flatnonzero(self.labels == number)[:num] for number, num in counts.items()]
        return self.at(np.sort(np.concatenate(chosen)) if chosen else np.empty(0, int))


class Profile:
    """Features (N, 17 C) float64 of cells (N, C, H, W) uint8 that need no weights: of every channel five quantiles of
    its grey levels, and log power, skewness and kurtosis of four octaves (`metrics.bands`).

    They are in standard deviations of `reference`, real training cells, from their mean, cut at +-5: a single bright
    speck would outweigh all else.
    """

    def __init__(self, reference: np.ndarray):
        found = self._raw(reference)
        self._mean, self._spread = found.mean(0), found.std(0) + 1e-6

    def __call__(self, cells: np.ndarray) -> np.ndarray:
        return np.clip((self._raw(cells) - self._mean) / self._spread, -_MOST_SPREADS, _MOST_SPREADS)

    @staticmethod
    def _raw(cells: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(cells), _CHUNK):
            part = cells[start : start + _CHUNK].astype(np.float32)
            levels = np.percentile(part, _QUANTILES, axis=(2, 3)).transpose(1, 2, 0).reshape(len(part), -1)
            found.append(np.concatenate([levels, band_statistics(part)], axis=1))
        return np.concatenate(found)


def distances(made: Cells, real: Cells, by: str, *, seed: int) -> dict[str, tuple[Estimate, int]]:
    """FIDo, FIDc, KIDo and KIDc by features of this name, each with a 95 % interval and its number.

    The interval of a mean over perturbations is the bootstrap over these; that of KIDo is `fidelity.kid`'s; FIDo has
    none (a resample repeats cells, which moves its bias). KID never pairs two cells of one origin.
    """
    draw, pair = numpy_generator(seed, "perturbations"), (made, real)
    counts = [Counter(side.labels.tolist()) for side in pair]
    shared = [c for c in sorted(counts[1]) if min(count[c] for count in counts) >= FEWEST]

    def kernel(one: Cells, other: Cells, **how) -> Estimate:
        return kid(one.features[by], other.features[by], groups=one.origins, real_groups=other.origins, **how)

    def frechet(one: Cells, other: Cells) -> float:
        return frechet_distance(one.features[by], other.features[by])

    found = {"FIDo": (Estimate(frechet(made, real), float("nan"), float("nan")), len(made.labels))}
    for name, of in (("FIDc", frechet), ("KIDc", lambda one, other: kernel(one, other).value)):
        values = np.array([of(*(side.at(side.labels == c) for side in pair)) for c in shared])
        found[name] = _mean(values, np.arange(len(values)), draw), len(values)
    found["KIDo"] = kernel(made, real, num_subsamples=_NUM_HALVES, generator=draw), len(made.labels)
    return found


def _mean(values: np.ndarray, groups: np.ndarray, draw: np.random.Generator) -> Estimate:
    """A mean with a bootstrap over groups; no interval of fewer than three."""
    found = estimate_mean(values, groups, num=NUM_RESAMPLES, generator=draw)
    return found if len(np.unique(groups)) >= 3 else found._replace(low=float("nan"), high=float("nan"))


class Teller:
    """A logistic regression on standardised features, fitted to real training cells."""

    def __init__(self, features: np.ndarray, truth: np.ndarray):
        self._model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
        self._model.fit(features, truth)

    def right(self, features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Whether each cell is told rightly, (N,) float64."""
        return (self._model.predict(features) == truth).astype(np.float64)


def measured(images: np.ndarray, *, dna: int, desc: str) -> np.ndarray:
    """(N, 3) float64, the `QUANTITIES` of each image (see `images.fluorescence.Nuclei`)."""
    jobs = progress(in_processes(measure_nuclei, images[:, dna], chunk=64), total=len(images), desc=desc, unit="cell")
    return np.array(list(jobs), np.float64).reshape(-1, len(QUANTITIES))


def effects(values: np.ndarray, cells: Cells, controls: np.ndarray, of: Cells) -> Effects:
    """The log (3,) of the middle ratio of measured quantities (N, 3) of cells to the middle of those of real controls
    (M, 3) of their batch, by perturbation and dose; of at least FEWEST cells with a nucleus."""
    none = np.full(len(QUANTITIES), np.nan)
    base = {b: _middle(controls[of.batches == b]) for b in np.unique(of.batches)}
    ratio = values / np.stack([base.get(b, none) for b in cells.batches])
    keys = list(zip(cells.labels.tolist(), map(_dose, cells.doses), strict=True))
    numbers = {key: [] for key in dict.fromkeys(keys)}
    for row, key in enumerate(keys):
        numbers[key].append(row)
    found = {key: ratio[rows] for key, rows in numbers.items()}
    return {key: np.log(_middle(r)) for key, r in found.items() if np.isfinite(r).all(1).sum() >= FEWEST}


def _middle(values: np.ndarray) -> np.ndarray:
    """(3,) of (N, 3): medians of area and intensity, and the mean number, whose median would hardly ever move; NaN for
    what is not above 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a batch in which no nucleus is found
        middle = np.append(np.nanmedian(values[:, :2], axis=0), np.nanmean(values[:, 2]))
    return np.where(middle > 0, middle, np.nan)


def _dose(dose: float) -> str:
    return f"{dose:.6g}"


def halves(controls: Cells) -> tuple[Cells, Cells]:
    """Every batch's controls in two halves, so that what two sets are compared with errs independently."""
    place = np.zeros(len(controls.labels), int)
    for batch in np.unique(controls.batches):
        own = np.flatnonzero(controls.batches == batch)
        place[own] = np.arange(len(own)) % 2
    return controls.at(place == 0), controls.at(place == 1)


def correlation(made: np.ndarray, real: np.ndarray, *, seed: int) -> Estimate:
    """Pearson's correlation of effects (K,) with a bootstrap over the K conditions; NaN for fewer than three."""
    if len(made) < 3:
        return Estimate(*(float("nan"),) * 3)
    draw = numpy_generator(seed, "perturbations", "correlation")
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(np.corrcoef(made, real)[0, 1])
        drawn = [np.corrcoef(made[i], real[i])[0, 1] for i in draw.integers(len(made), size=(NUM_RESAMPLES, len(made)))]
    return Estimate(value, *np.nanpercentile(drawn, COVERAGE))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What methods are compared with: real cells, and what is trained on them.

    `train`, to which regressions are fitted, and `test` are real cells with features by name, `controls` real controls;
    `unseen` numbers perturbations that no training saw; `moa` gives the mode of action of a perturbation's number,
    where known; `dna` is the nuclear channel.
    """

    train: Cells
    test: Cells
    controls: Cells
    unseen: Sequence[int]
    moa: Mapping[int, str]
    dna: int
    seed: int
    _tellers: dict[tuple[str, str], Teller | None] = field(default_factory=dict, init=False)

    def rows(self, methods: Mapping[str, Cells]) -> list[Row]:
        """All figures of all methods, each a set of made cells with features of the same names.

        A method may lack a perturbation. Where it has one, distances use as many cells of it as every method that has
        it. What is told of the real test cells themselves is a row of its own, TEST.
        """
        bases = [(of, self._measured(of, "controls")) for of in halves(self.controls)]
        of_real = effects(self._measured(self.test, TEST), self.test, bases[0][1], bases[0][0])
        everything = [Counter(cells.labels.tolist()) for cells in (self.test, *methods.values())]
        common = {c: min(count[c] for count in everything if count[c]) for c in everything[0]}
        rows = []
        for group, wanted in (("seen", False), ("unseen", True)):
            inside = {c: num for c, num in common.items() if (c in self.unseen) == wanted}
            real = self.test.at(np.isin(self.test.labels, list(inside)))
            rows += [Row(TEST, group, *figure) for figure in self._told(real, group)]
            for name, cells in methods.items():
                made = cells.at(np.isin(cells.labels, list(inside)))
                if len(made.labels):
                    own = effects(self._measured(made, name), made, bases[1][1], bases[1][0])
                    figures = [*self._distances(made.first(inside), real.first(inside)), *self._told(made, group)]
                    figures += self._correlations(own, of_real)
                    rows += [Row(name, group, *figure) for figure in figures]
        return rows

    def _measured(self, cells: Cells, name: str) -> np.ndarray:
        return measured(cells.images, dna=self.dna, desc=f"nuclei: {name}")

    def _distances(self, made: Cells, real: Cells) -> Iterator[tuple[str, str, Estimate, int]]:
        for by in made.features:
            found = distances(made, real, by, seed=self.seed)
            yield from ((figure, by, *value) for figure, value in found.items())

    def _told(self, made: Cells, group: str) -> Iterator[tuple[str, str, Estimate, int]]:
        """How many cells are told rightly by regressions on real training cells, of which none knows a perturbation
        that no training saw."""
        for figure, truth in self._truths(made).items():
            known = truth != ""
            for by in made.features if known.any() and (figure, group) != ("perturbation", "unseen") else ():
                if teller := self._teller(by, figure):
                    draw = numpy_generator(self.seed, "perturbations", "told")
                    is_right = teller.right(made.features[by][known], truth[known])
                    told = _mean(is_right, wells(made)[known], draw)
                    yield f"{figure} told", by, told, int(known.sum())

    def _truths(self, cells: Cells) -> dict[str, np.ndarray]:
        """What is to be told of each cell; an empty text where it is not known."""
        return {
            "perturbation": cells.labels.astype(str),
            "mode of action": np.array([self.moa.get(number, "") for number in cells.labels.tolist()]),
            "batch": np.where(cells.batches < 0, "", cells.batches.astype(str)),
        }

    def _teller(self, by: str, figure: str) -> Teller | None:
        if (by, figure) not in self._tellers:
            truth = self._truths(self.train)[figure]
            known = truth != ""
            is_enough = len(np.unique(truth[known])) > 1
            self._tellers[by, figure] = Teller(self.train.features[by][known], truth[known]) if is_enough else None
        return self._tellers[by, figure]

    def _correlations(self, own: Effects, real: Effects) -> Iterator[tuple[str, str, Estimate, int]]:
        keys = [key for key in own if key in real]
        sides = [np.array([side[key] for key in keys]).reshape(-1, len(QUANTITIES)).T for side in (own, real)]
        for quantity, *pair in zip(QUANTITIES, *sides, strict=True):
            yield f"effect on {quantity}", "measurement", correlation(*pair, seed=self.seed), len(keys)


def wells(cells: Cells) -> np.ndarray:
    """A number (N,) for the cells of one perturbation, dose and batch, which are not independent."""
    doses = np.unique([_dose(dose) for dose in cells.doses], return_inverse=True)[1]
    return np.unique(np.stack([cells.labels, cells.batches, doses]), axis=1, return_inverse=True)[1].ravel()


def swap_rows(method: str, made: np.ndarray, swapped: np.ndarray, sources: np.ndarray, *, seed: int) -> list[Row]:
    """How far cells (n, C, H, W) uint8 move where only their condition changes: in grey levels, and as the cosine of
    both changes of the source (1: the condition is ignored)."""
    made, swapped, sources = (of.reshape(len(of), -1).astype(np.float64) for of in (made, swapped, sources))
    one, other = made - sources, swapped - sources
    size = np.maximum(np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1), 1e-9)
    values = {"grey levels": np.abs(made - swapped).mean(1), "cosine": (one * other).sum(1) / size}
    draw, each = numpy_generator(seed, "perturbations", "swap"), np.arange(len(made))
    return [
        Row(method, "all", f"condition swapped, {name}", "pixels", found, len(made))
        for name, of in values.items()
        for found in [estimate_mean(of, each, num=NUM_RESAMPLES, generator=draw)]
    ]

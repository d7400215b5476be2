"""Figures of cells on held-out patches: from sums over groups, so that intervals come from drawing groups and seeds.

Every figure is a function of sums over the patches of a group. A resample draws the groups, and the seeds, with
replacement; the same draws serve all arms, so that differences are paired (cluster bootstrap). A resample that lacks a
class has no figure and is left out.
"""

import json
from collections.abc import Callable
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import COVERAGE
from cellflux_bridge.study.plan import Cell, cell_digest, cell_folder, cells
from cellflux_bridge.study.settings import StudyConfig

NUM_RESAMPLES = 2000
_BINS = 15
# Areas under the curve rest on pairs of groups, so that more groups than these are drawn in bundles.
_MOST_GROUPS = 300


class Draws(NamedTuple):
    """Resamples: how often each group (R, G) and each seed (R, S) is drawn; row 0 takes every one once."""

    groups: np.ndarray
    seeds: np.ndarray


def draw(num_groups: int, num_seeds: int, *, seed: int) -> Draws:
    rng = numpy_generator(seed, "study bootstrap")

    def counts(num: int) -> np.ndarray:
        drawn = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
        return np.concatenate([np.ones((1, num)), drawn])

    return Draws(counts(num_groups), counts(num_seeds))


def result_of(config: StudyConfig, cell: Cell) -> dict | None:
    """What a cell's result.json holds; None where there is none, or that of other settings."""
    file = cell_folder(config, cell) / "result.json"
    if not file.exists():
        return None
    try:
        found = json.loads(regular(file).read_text(encoding="utf-8"))
        if not 0 <= float(found["seconds"]) < float("inf"):
            raise ValueError("seconds is no time")
        return found if found["digest"] == cell_digest(config, cell) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error!r:.200}); remove its folder, the cell is run again") from error


def finished(config: StudyConfig) -> dict[Cell, dict]:
    """The cells that have a result, and it."""
    return {cell: found for cell in cells(config) if (found := result_of(config, cell)) is not None}


def probabilities(config: StudyConfig, cell: Cell, split: str, *, num: int, num_classes: int) -> np.ndarray:
    """(N, num_classes) float32 of a finished cell; UserError where they do not fit the patches of the split."""
    file = cell_folder(config, cell) / "probabilities.npz"
    try:
        with np.load(regular(file), allow_pickle=False) as found:
            values = found[split]
        fits = values.shape == (num, num_classes) and values.dtype == np.float32
        fits = fits and bool((values >= 0).all() and (values <= 1).all())
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{file}: damaged ({error!r:.200}); remove its folder, the cell is run again") from error
    if not fits:
        raise UserError(f"{file}: of other patches than this study's; remove its folder, the cell is run again")
    return values


def bundled(groups: np.ndarray, *, seed: int) -> tuple[np.ndarray, int]:
    """The number of each patch's group, (N,) from 0 on, and how many there are. Of more than 300 several share a
    number, whole and by the seed: draws of bundles are draws of independent parts, too."""
    names, numbers = np.unique(groups, return_inverse=True)
    order = numpy_generator(seed, "study bundles").permutation(len(names))
    return order[numbers] % _MOST_GROUPS, min(len(names), _MOST_GROUPS)


class Sums(NamedTuple):
    """What the figures of one arm need, of S seeds and G groups: counts of (true, predicted) classes (S, G, C, C);
    excess of confidence over accuracy in bins (S, G, 15); and of every class the pairs of a patch of it and another
    one that are in order (S, C, G, G), the first index the group of the class's patch."""

    confusion: np.ndarray
    excess: np.ndarray
    ordered: np.ndarray


def sums(values: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_groups: int) -> Sums:
    """Of probabilities (S, N, C), classes (N,) and groups (N,)."""
    num_seeds, _, num_classes = values.shape
    predicted, top = values.argmax(2), values.max(2)
    confusion = np.zeros((num_seeds, num_groups, num_classes, num_classes))
    excess, bins = np.zeros((num_seeds, num_groups, _BINS)), np.minimum((top * _BINS).astype(int), _BINS - 1)
    for number in range(num_seeds):
        np.add.at(confusion[number], (groups, labels, predicted[number]), 1)
        np.add.at(excess[number], (groups, bins[number]), top[number] - (predicted[number] == labels))
    ordered = np.zeros((num_seeds, num_classes, num_groups, num_groups), np.float32)
    for number, label in np.ndindex(num_seeds, num_classes):
        score, is_of = values[number, :, label], labels == label
        for group in range(num_groups):
            others = np.sort(score[~is_of & (groups == group)])
            sides = [np.searchsorted(others, score[is_of], side=side) for side in ("left", "right")]
            wins = np.mean(sides, axis=0)  # a tie counts half
            ordered[number, label, :, group] = np.bincount(groups[is_of], wins, minlength=num_groups)
    return Sums(confusion, excess, ordered)


def _recalls(table: np.ndarray) -> np.ndarray:
    """Of each class (..., C) the share of its patches that are called so; NaN for an absent class."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(table, axis1=-2, axis2=-1) / table.sum(-1)


def _table(of: Sums, draws: Draws) -> np.ndarray:
    return np.einsum("rg,sgij->rsij", draws.groups, of.confusion)


def balanced_accuracy(of: Sums, draws: Draws) -> np.ndarray:
    return _recalls(_table(of, draws)).mean(-1)


def macro_f1(of: Sums, draws: Draws) -> np.ndarray:
    table = _table(of, draws)
    right = np.diagonal(table, axis1=-2, axis2=-1)
    each = 2 * right / np.maximum(table.sum(-1) + table.sum(-2), 1e-12)
    return np.where((table.sum(-1) == 0).any(-1), np.nan, each.mean(-1))


def sensitivity(of: Sums, draws: Draws) -> np.ndarray:
    """The recall of the last class; of more than two the mean recall."""
    recalls = _recalls(_table(of, draws))
    return recalls[..., -1] if recalls.shape[-1] == 2 else recalls.mean(-1)


def specificity(of: Sums, draws: Draws) -> np.ndarray:
    """The share of other patches that are not called the last class; of more than two classes the mean over them."""
    table = _table(of, draws)
    total, true, called = table.sum((-2, -1))[..., None], table.sum(-1), table.sum(-2)
    right = np.diagonal(table, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        found = (total - true - called + right) / (total - true)
    return found[..., -1] if table.shape[-1] == 2 else found.mean(-1)


def area_under_curve(of: Sums, draws: Draws) -> np.ndarray:
    """The mean over classes, one against the rest (of two classes that of the last): the share of ordered pairs."""
    true = np.einsum("rg,sgij->rsi", draws.groups, of.confusion)
    pairs = true * (true.sum(-1, keepdims=True) - true)
    won = np.einsum("rg,scgh,rh->rsc", draws.groups, of.ordered, draws.groups, optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = won / pairs
    return area[..., -1] if area.shape[-1] == 2 else area.mean(-1)


def calibration_error(of: Sums, draws: Draws) -> np.ndarray:
    """Expected calibration error over 15 bins (Guo et al. 2017)."""
    total = _table(of, draws).sum((-2, -1))
    return np.abs(np.einsum("rg,sgb->rsb", draws.groups, of.excess)).sum(-1) / total


FIGURES: dict[str, Callable[[Sums, Draws], np.ndarray]] = {
    "balanced accuracy": balanced_accuracy,
    "macro F1": macro_f1,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "AUC": area_under_curve,
    "calibration error": calibration_error,
}


# Resamples repeat patches, and with them chance, so that they have more calibration error: it gets no interval.
BIASED = ("calibration error",)


def resampled(figure: Callable[[Sums, Draws], np.ndarray], of: Sums, draws: Draws) -> np.ndarray:
    """(1 + R,): the mean over seeds of a figure, of all first and then of each resample."""
    each = figure(of, draws)
    weights = np.where(np.isnan(each), 0, draws.seeds)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(each) * weights).sum(1) / weights.sum(1)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """A value and its 95 % interval of `resampled` values."""
    known = values[1:][np.isfinite(values[1:])]  # a small resample may lack a class
    low, high = np.percentile(known, COVERAGE) if len(known) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of a difference being 0, from its resamples: twice the smaller share beyond 0."""
    drawn = differences[1:][np.isfinite(differences[1:])]
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def holm(values: list[float], *, num: int) -> list[float]:
    """p values, in their order, after Holm's correction (1979) for `num` tests; those not done yet count as larger."""
    order, adjusted, largest = np.argsort(values), np.empty(len(values)), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (num - rank) * values[number]))
        adjusted[number] = largest
    return adjusted.tolist()

"""The levels of training images: the soft label of each image, where a flow's condition is a level.

`condition.level` says where they come from: the patch's class, its score in the data, or cross-fitting, that is, the
probabilities of classifiers that were not trained on the patch's group (patient, slide, tile), between what stands for
the classes (`class_ends`). Cross-fitting writes

<run>/crossfit/fold-<k>/      each a classifier's run, resumed like any other
<run>/levels.csv              path, label, fold (empty for patches that none trains on), p_<class> and level_<class> of
                              every class
<run>/levels.json             figures and histograms of the out-of-fold probabilities, and their cost
"""

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from scipy.special import softmax
from sklearn.model_selection import StratifiedGroupKFold

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows, csv_text, replace_text
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.calibration import balanced_weights, figures, fit_temperature
from cellflux_bridge.classifier.task import ClassifierTask
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.soft_labels import soft_labels
from cellflux_bridge.training.loop import fit, on_rank_zero
from cellflux_bridge.training.run import claim, record_splits, require_free

_CHUNK = 128
_USES = ("seed", "data", "classifier")
# Ends that are less apart would make the noise of probabilities more than five times as large in levels.
_LEAST_APART = 0.2


def target_levels(config: Config, patches: Patches, *, folder: Path, fabric: Fabric) -> np.ndarray:
    """The soft label (N, num_classes) float32 of every training and validation patch; test patches without one are NaN.

    Cross-fitted levels are read from `<folder>/levels.csv` if it exists, so that a resumed run keeps its levels. Raises
    UserError for a missing score, for too few groups, for a folder that holds the levels of another configuration or of
    other patches, and Stopped after Ctrl-C; finished folds are kept.
    """
    if config.condition.level != "crossfit":
        needed = np.concatenate([patches.indices("train"), patches.indices("val")])
        return soft_labels(patches, config.condition.level, needed=needed, key="condition.level")
    guide = config.classifier.model_copy(update={"role": "guide", "sees": "image"})
    config, runs = config.model_copy(update={"classifier": guide}), folder / "crossfit"
    held_out = assign_folds(patches, num_folds=guide.folds, seed=config.seed)

    def prepare() -> None:
        require_free(runs, config, uses=_USES, resume="auto")
        record_splits(runs, patches)
        claim(runs, config)
        for fold in range(guide.folds):
            (runs / f"fold-{fold}").mkdir(exist_ok=True)

    on_rank_zero(fabric, prepare)
    if not fabric.broadcast((folder / "levels.csv").exists()):
        train, newest = patches.indices("train"), []
        for fold in range(guide.folds):
            rest, stream = train[held_out[train] != fold], f"crossfit {fold} of {guide.folds}"
            task = ClassifierTask(config, patches, train=rest, stream=stream)
            newest.append(fit(task, config, guide.train, folder=runs / f"fold-{fold}", fabric=fabric))
        on_rank_zero(fabric, lambda: _write(folder, config, patches, held_out, newest, device=fabric.device))
    return read_levels(folder / "levels.csv", patches)


def assign_folds(patches: Patches, *, num_folds: int, seed: int) -> np.ndarray:
    """The fold (N,) in which each training patch is held out, -1 for all others; groups go whole.

    Classes are spread as evenly over the folds as groups allow. Raises UserError where there are fewer groups than
    folds, or a class whose groups all stand in one fold.
    """
    train = patches.indices("train")
    groups, labels = patches.groups[train], patches.labels[train]
    num_groups = len(np.unique(groups))
    few = f"classifier.folds={num_folds}: the training split has {num_groups} groups (patients, slides, tiles)"
    if num_groups < num_folds:
        raise UserError(f"{few}; set classifier.folds to at most {num_groups}, or condition.level=class")
    folds = np.full(len(patches.labels), -1)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=derive_seed(seed, "crossfit") % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of small classes, about which more is said below
        try:
            parts = list(splitter.split(train, labels, groups))
        except ValueError as error:
            raise UserError(f"{few} and {len(train)} patches: {error}; lower classifier.folds") from error
    for number, (rest, held_out) in enumerate(parts):
        folds[train[held_out]] = number
        if len(np.unique(labels[rest])) < len(patches.classes) or not len(held_out):
            num_of = [len(np.unique(groups[labels == c])) for c in range(len(patches.classes))]
            counts = ", ".join(f"{label!r} in {num}" for label, num in zip(patches.classes, num_of, strict=True))
            raise UserError(
                f"{few}, too few to hold some out and train on the rest ({counts}); set classifier.folds to another "
                "number, name smaller groups, or set condition.level=class"
            )
    return folds


def class_ends(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each of K classes the probabilities (K, K) that stand for it: a quarter of its patches have more of its own.

    `probabilities` (N, K), `labels` (N,). The other classes share the rest as they do on average. So an end is well
    inside of what the class has, and no one odd patch moves it.
    """
    ends = []
    for c in range(probabilities.shape[1]):
        own = probabilities[labels == c].astype(np.float64)
        end, upper = own.mean(0), np.quantile(own[:, c], 0.75)
        end *= (1 - upper) / max(1 - end[c], np.finfo(float).tiny)
        end[c] = upper
        ends.append(end)
    return np.stack(ends)


def between_ends(probabilities: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Probabilities (N, K) as mixtures (N, K) of K classes, for which the rows of `ends` (K, K) stand.

    u with u @ ends = p; what lies beyond is cut off and the rest scaled to sum to 1. So of two classes the level of the
    second is (p - p_first) / (p_second - p_first), within [0, 1]. Classifiers that learned from mixtures, or little,
    say 0 or 1 of no patch: with bare probabilities level 1 would be what the most extreme few look like, or beyond.
    Black box shift estimation, too, inverts a soft confusion matrix (Lipton et al. 2018).

    None where the ends lie too near each other: an eigenvalue of `ends` (1 and, of two classes, p_second - p_first) is
    below 0.2.
    """
    if np.linalg.eigvals(ends).real.min() < _LEAST_APART:
        return None
    mixtures = np.clip(probabilities @ np.linalg.inv(ends), 0, None)
    return (mixtures / mixtures.sum(1, keepdims=True)).astype(probabilities.dtype)


def _write(
    folder: Path, config: Config, patches: Patches, held_out: np.ndarray, newest: list[Path], *, device: torch.device
) -> None:
    """Score every patch by classifiers that never saw its group, write the tables, and print how well that went."""
    train, others = patches.indices("train"), np.concatenate([patches.indices("val"), patches.indices("test")])
    logits, of_others = np.zeros((len(patches.labels), len(patches.classes)), np.float32), []
    score = partial(inference.patch_logits, patches=patches, device=device, chunk=_CHUNK, flips=config.data.flips)
    for fold, path in enumerate(newest):
        model = inference.load(path, device)
        held = np.flatnonzero(held_out == fold)
        logits[held] = score(model, indices=held)
        of_others.append(score(model, indices=others))
    truth = patches.labels[train]
    targets = soft_labels(patches, config.classifier.labels, needed=train, key="classifier.labels")[train]
    temperature = fit_temperature(logits[train], targets, balanced_weights(truth))
    p = np.full_like(logits, np.nan)
    p[train] = softmax(logits[train] / temperature, axis=1)
    p[others] = np.mean([softmax(found / temperature, axis=1) for found in of_others], axis=0)
    ends = class_ends(p[train], truth)
    mixtures = between_ends(p, ends)
    levels = p if mixtures is None else mixtures
    report = {
        "out_of_fold": figures(logits[train], truth, targets, temperature=temperature),
        "histogram": {
            label: {
                f"level_{other}": np.histogram(levels[train][truth == c, d], bins=10, range=(0, 1))[0].tolist()
                for d, other in enumerate(patches.classes)
            }
            for c, label in enumerate(patches.classes)
        },
        "cpu_minutes": sum(checkpoint.load_state(path)["cpu_seconds"] for path in newest) / 60,
        "checkpoints": [str(path.relative_to(folder)) for path in newest],
    }
    rows = [["path", "label", "fold", *(f"{kind}_{label}" for kind in ("p", "level") for label in patches.classes)]]
    for i in np.concatenate([train, others]):
        fold = held_out[i] if held_out[i] >= 0 else ""
        figures_of_it = (f"{value:.6f}" for value in (*p[i], *levels[i]))
        rows.append([patches.ids[i], patches.classes[patches.labels[i]], fold, *figures_of_it])
    replace_text(folder / "levels.json", json.dumps(report, indent=1) + "\n")
    replace_text(folder / "levels.csv", csv_text(rows))
    print(f"levels: {folder / 'levels.csv'}, {report['cpu_minutes']:.1f} CPU minutes of cross-fitting; out of fold:")
    for name, value in report["out_of_fold"].items():
        print(f"  {name:<20} {value:.4g}")
    if mixtures is None:
        print(
            "WARNING: these classifiers say nearly the same of all classes, so levels are bare probabilities, whose "
            f"upper quartiles are {ends.diagonal().round(2).tolist()}: train them longer (classifier.train.steps), or "
            "look whether the classes differ at this size"
        )
    for label, histogram in report["histogram"].items():  # are there levels between?
        print(f"  levels of {patches.classes[-1]} in tenths, of {label}: {histogram[f'level_{patches.classes[-1]}']}")


def read_levels(path: Path, patches: Patches) -> np.ndarray:
    """The soft labels (N, num_classes) float32 of a `levels.csv`; patches that it lacks are NaN.

    A table without `level_<class>`, of an earlier version, has levels that are its probabilities.

    Raises UserError for a damaged table and where a training or validation patch is missing.
    """
    levels = np.full((len(patches.ids), len(patches.classes)), np.nan, np.float32)
    number = {patch_id: i for i, patch_id in enumerate(patches.ids)}
    try:
        for row in csv_rows(path):
            kind = "level" if f"level_{patches.classes[0]}" in row else "p"
            levels[number[row["path"]]] = [float(row[f"{kind}_{label}"]) for label in patches.classes]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or of other patches ({error!r}); remove it and it is made again") from error
    needed = np.concatenate([patches.indices("train"), patches.indices("val")])
    if np.isnan(levels[needed]).any():
        raise UserError(f"{path}: lacks patches of the training or validation split; remove it and it is made again")
    return levels / levels.sum(1, keepdims=True)

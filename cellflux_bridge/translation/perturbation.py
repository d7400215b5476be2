"""Treated cells made from controls of their own batch, one for each real treated cell of a split.

<folder>/cells.csv     a row a cell: perturbation, batch, dose, the real cell, the control that it was made from
<folder>/made.npy      the made cells (N, C, H, W) uint8, in the order of the rows
<folder>/made_with.json  what made them, and how many are done, in the order of perturbations
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_text, mapped, regular, replace_text, reserved
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.settings import PairsConfig
from cellflux_bridge.translation.flow import FlowTranslator
from cellflux_bridge.translation.inputs import Sources

# Training cells that regressions are fitted to, and controls of a batch that are measured.
_MOST_TRAINED, _MOST_CONTROLS = 20_000, 400
_COLUMNS = ("perturbation", "batch", "dose", "real", "control")


class Matched(NamedTuple):
    """Numbers (N,) of real treated cells of a data set, and of a control for each; how many treated cells have no
    control in their batch and were left out."""

    treated: np.ndarray
    control: np.ndarray
    left_out: int = 0


def control_class(translator: FlowTranslator) -> str:
    """The class that all transitions of a run start from; UserError where there are several."""
    config = translator.config
    if config.translate.source is not None:
        return config.translate.source
    starts = {a for a, b in named_transitions(translator.classes, config.pairs) if a != b}
    if len(starts) != 1:
        raise UserError(
            f"{config.output}: transitions start from {abbreviate(sorted(starts))}; name the controls' class with "
            "translate.source"
        )
    return starts.pop()


def match_controls(
    patches: Patches,
    control: str,
    targets: Sequence[str],
    *,
    split: str,
    num: int | None,
    pairs: PairsConfig,
    seed: int,
) -> Matched:
    """At most `num` treated cells of each target in a split, each with a control of that split: with
    pairs.match_batch, of its own batch.

    Both are drawn by the seed; controls take turns. A cell whose batch is not known or has no control there is left out
    and counted, or a UserError, as pairs.batch_without_source says. UserError, too, where no cell is left.
    """
    found = [patches.sample(split, label, num=num, seed=seed) for label in targets]
    treated, controls = np.concatenate([np.empty(0, np.int64), *found]), patches.indices(split, control)
    if len(treated) == 0 or len(controls) == 0:
        lacking = "treated cell" if len(treated) == 0 else f"cell of the controls' class {control!r}"
        raise UserError(f"the {split} split has no {lacking}; name splits in the data, or raise data.split.{split}")
    batches = patches.batches if pairs.match_batch else np.zeros(len(patches.labels), int)
    chosen = np.full(len(treated), -1)
    for batch in np.unique(batches[treated]):
        own, rows = controls[batches[controls] == batch], np.flatnonzero(batches[treated] == batch)
        if len(own) and batch >= 0:
            order = numpy_generator(seed, "controls", split, int(batch)).permutation(own)
            chosen[rows] = np.resize(order, len(rows))
    kept = chosen >= 0
    if not kept.all() and (pairs.batch_without_source == "error" or not kept.any()):
        without = np.unique(batches[treated[~kept]])
        names = ["not known" if batch < 0 else patches.batch_names[batch] for batch in without]
        raise UserError(
            f"{(~kept).sum()} treated cells of the {split} split have no control in their batch: {abbreviate(names)}; "
            "set pairs.batch_without_source=leave_out to go on without them"
        )
    return Matched(treated[kept], chosen[kept], int((~kept).sum()))


def training_cells(patches: Patches, treated: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of training cells of the treated cells' perturbations: as many as there are of these, at most half, to
    stand beside methods, and others that regressions are fitted to. UserError where there are none."""
    draw, parts = numpy_generator(seed, "perturbations", "training cells"), ([np.empty(0, int)], [np.empty(0, int)])
    train = draw.permutation(patches.indices("train"))
    for label, num in zip(*np.unique(patches.labels[treated], return_counts=True), strict=True):
        own = train[patches.labels[train] == label]
        for part, chosen in zip(parts, np.split(own, [min(num, len(own) // 2)]), strict=True):
            part.append(chosen)
    as_many, fitted = map(np.concatenate, parts)
    if not len(fitted):
        raise UserError(
            "no training cell has a perturbation that is evaluated here, so there is nothing to compare with; evaluate "
            "seen perturbations, too (data.split.unseen names the others)"
        )
    return as_many, draw.permutation(fitted)[:_MOST_TRAINED]


def some_of_each_batch(patches: Patches, controls: np.ndarray) -> np.ndarray:
    """At most so many controls of every batch as give it a sure median."""
    own = patches.batches[controls]
    return np.concatenate([controls[own == batch][:_MOST_CONTROLS] for batch in np.unique(own)])


def make_treated(translator: FlowTranslator, patches: Patches, matched: Matched, folder: Path) -> np.ndarray:
    """The made cells (N, C, H, W) uint8, memory-mapped, of matched cells. A cell's noise is that of its real cell's
    name. `folder` keeps them; a call that was stopped goes on there.

    UserError for a folder of cells that were made otherwise, and for a damaged one.
    """
    rows = csv_text([_COLUMNS, *_rows(patches, matched)])
    made_with = {"network": translator.identity(), "cells": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    stamp, file = folder / "made_with.json", folder / "made.npy"
    if linked := [path for path in (folder, stamp, file) if path.is_symlink()]:
        raise UserError(f"{linked[0]}: is a symbolic link, through which nothing is written; choose another --output")
    shape = (len(matched.treated), *_shape(translator))
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        reserved(file, np.uint8, shape).flush()
        replace_text(folder / "cells.csv", rows)
        replace_text(stamp, json.dumps({**made_with, "done": 0}) + "\n")
    try:
        kept = json.loads(regular(stamp).read_text(encoding="utf-8"))
        done, same = int(kept.pop("done")), kept == made_with
        made = mapped(file, mode="r+")
        if same and ((made.shape, made.dtype) != (shape, np.uint8) or not 0 <= done <= len(made)):
            raise ValueError(f"{file.name} holds {made.dtype} {made.shape}, of which {done} are done")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}: damaged ({error}); remove it, and its cells are made again") from error
    if not same:
        raise UserError(f"{folder}: holds cells that were made otherwise; choose another --output, or remove it")
    left = np.argsort(_targets(translator, patches, matched.treated), kind="stable")[done:]
    if len(left):
        sources = _sources(translator, patches, matched, left)
        for part, frames in translator.last_frames(sources, source=control_class(translator)):
            made[left[part]] = frames
            made.flush()
            done += len(part)
            replace_text(stamp, json.dumps({**made_with, "done": done}) + "\n")
    return mapped(file)


def make_swapped(
    translator: FlowTranslator, patches: Patches, matched: Matched, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows (n,) for which another row has another perturbation or dose, and the cells (n, C, H, W) uint8 that come
    of their controls and noise under that other condition."""
    keys = np.stack([patches.labels[matched.treated[rows]], patches.doses[matched.treated[rows]]], axis=1)
    number = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(number, kind="stable")
    other = np.empty_like(order)
    other[order] = np.roll(order, -np.bincount(number).max())  # past all rows of one condition
    differs = number[other] != number
    rows, given = rows[differs], rows[other][differs]
    made = np.empty((len(rows), *_shape(translator)), np.uint8)
    if len(rows):
        sources = _sources(translator, patches, matched, rows, given=given)
        for part, frames in translator.last_frames(sources, source=control_class(translator)):
            made[part] = frames
    return rows, made


def _shape(translator: FlowTranslator) -> tuple[int, int, int]:
    size = translator.preprocessing.image_size
    return (translator.preprocessing.channels, size, size)


def _targets(translator: FlowTranslator, patches: Patches, treated: np.ndarray) -> np.ndarray:
    """The numbers that a network knows the perturbations of treated cells by."""
    return np.array([translator.classes.index(label) for label in patches.classes])[patches.labels[treated]]


def _sources(
    translator: FlowTranslator, patches: Patches, matched: Matched, rows: np.ndarray, given: np.ndarray | None = None
) -> Sources:
    """The controls of some rows, which are to become like their own treated cells, or those of the rows `given`."""
    controls, treated = matched.control[rows], matched.treated[rows]
    like = treated if given is None else matched.treated[given]

    def of(numbers: Sequence[int]):
        return patches.centre(controls[np.asarray(numbers)])

    names, targets = [patches.ids[i] for i in treated], _targets(translator, patches, like)
    return Sources(names, of, patches.batches[treated], patches.doses[like], targets)


def _rows(patches: Patches, matched: Matched) -> list[list]:
    rows = []
    for i, j in zip(matched.treated.tolist(), matched.control.tolist(), strict=True):
        batch = patches.batch_names[patches.batches[i]] if patches.batches[i] >= 0 else ""
        dose = f"{patches.doses[i]:.6g}" if patches.doses[i] > 0 else ""
        rows.append([patches.classes[patches.labels[i]], batch, dose, patches.ids[i], patches.ids[j]])
    return rows

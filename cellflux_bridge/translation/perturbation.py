"""Treated cells made from controls of their own batch, one for each real treated cell of a split.

<folder>/cells.csv     a row a cell: perturbation, batch, dose, the real cell, the control that it was made from
<folder>/made.npy      the made cells (N, C, H, W) uint8, in the order of the rows
<folder>/made_with.json  what made them, and which perturbations are done
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import csv_text, regular, replace_text, reserved
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.translation.flow import FlowTranslator
from cellflux_bridge.translation.inputs import Sources


class Matched(NamedTuple):
    """Numbers (N,) of real treated cells of a data set, and of a control of the same batch for each."""

    treated: np.ndarray
    control: np.ndarray


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


def match_controls(patches: Patches, control: str, *, split: str, num: int | None, seed: int) -> Matched:
    """At most `num` treated cells of every class in a split, each with a control of its own batch and split.

    Both are drawn by the seed; the controls of a batch take turns. UserError that counts cells whose batch has no
    control there, and where no class but the control has a cell.
    """
    labels = [label for label in patches.classes if label != control]
    treated = np.concatenate([patches.sample(split, label, num=num, seed=seed) for label in labels])
    controls = patches.indices(split, control)
    if len(treated) == 0 or len(controls) == 0:
        lacking = "treated cell" if len(treated) == 0 else f"cell of the controls' class {control!r}"
        raise UserError(f"the {split} split has no {lacking}; name splits in the data, or raise data.split.{split}")
    chosen = np.full(len(treated), -1)
    for batch in np.unique(patches.batches[treated]):
        own = controls[patches.batches[controls] == batch]
        rows = np.flatnonzero(patches.batches[treated] == batch)
        if len(own):
            order = numpy_generator(seed, "controls", split, int(batch)).permutation(own)
            chosen[rows] = np.resize(order, len(rows))
    if (lacking := chosen < 0).any():
        found = np.unique(patches.batches[treated[lacking]])
        names = ["none" if batch < 0 else patches.batch_names[batch] for batch in found]
        raise UserError(
            f"{lacking.sum()} treated cells of the {split} split have no control in their batch: {abbreviate(names)}; "
            "leave such batches out of the split (data.without)"
        )
    return Matched(treated, chosen)


def make_treated(translator: FlowTranslator, patches: Patches, matched: Matched, folder: Path) -> np.ndarray:
    """The made cells (N, C, H, W) uint8, memory-mapped, of matched cells. A cell's noise is that of its real cell's
    name. `folder` keeps them; a call that was stopped goes on there with the perturbations that are not done.

    UserError for a folder of cells that were made otherwise, and for a damaged one.
    """
    rows = csv_text([_COLUMNS, *_rows(patches, matched)])
    made_with = {"network": translator.identity(), "cells": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    stamp, file = folder / "made_with.json", folder / "made.npy"
    shape = (len(matched.treated), *_shape(translator))
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        reserved(file, np.uint8, shape).flush()
        replace_text(folder / "cells.csv", rows)
        replace_text(stamp, json.dumps({**made_with, "done": []}) + "\n")
    try:
        kept = json.loads(regular(stamp).read_text(encoding="utf-8"))
        done, same = list(kept.pop("done")), kept == made_with
        made = open_memmap(regular(file), mode="r+")
        if same and (made.shape, made.dtype) != (shape, np.uint8):
            raise ValueError(f"{file.name} holds {made.dtype} {made.shape}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: damaged ({error}); remove it, and its cells are made again") from error
    if not same:
        raise UserError(f"{folder}: holds cells that were made otherwise; choose another --output, or remove it")
    source, labels = control_class(translator), patches.labels[matched.treated]
    for label in (patches.classes[number] for number in np.unique(labels)):
        if label not in done:
            rows = np.flatnonzero(labels == patches.class_index(label))
            for part, frames in translator.last_frames(_sources(patches, matched, rows), source=source, target=label):
                made[rows[part]] = frames
            made.flush()
            done.append(label)
            replace_text(stamp, json.dumps({**made_with, "done": done}) + "\n")
    return open_memmap(file, mode="r")


def make_swapped(translator: FlowTranslator, patches: Patches, matched: Matched, rows: np.ndarray) -> np.ndarray:
    """The cells of some rows as they would be under the next row's perturbation and dose, of the same control and
    noise: (n, C, H, W) uint8."""
    made = np.empty((len(rows), *_shape(translator)), np.uint8)
    given = np.roll(rows, -1)
    for number in np.unique(patches.labels[matched.treated[given]]):
        chosen = np.flatnonzero(patches.labels[matched.treated[given]] == number)
        sources = _sources(patches, matched, rows[chosen])
        sources = sources._replace(doses=patches.doses[matched.treated[given[chosen]]])
        how = {"source": control_class(translator), "target": patches.classes[number]}
        for part, frames in translator.last_frames(sources, **how):
            made[chosen[part]] = frames
    return made


def _shape(translator: FlowTranslator) -> tuple[int, int, int]:
    size = translator.preprocessing.image_size
    return (translator.preprocessing.channels, size, size)


def _sources(patches: Patches, matched: Matched, rows: np.ndarray) -> Sources:
    controls, treated = matched.control[rows], matched.treated[rows]

    def of(numbers: Sequence[int]):
        return patches.centre(controls[np.asarray(numbers)])

    names = [patches.ids[i] for i in treated]
    return Sources(names, of, patches.batches[treated], patches.doses[treated])


_COLUMNS = ("perturbation", "batch", "dose", "real", "control")


def _rows(patches: Patches, matched: Matched) -> list[list]:
    rows = []
    for i, j in zip(matched.treated.tolist(), matched.control.tolist(), strict=True):
        batch = patches.batch_names[patches.batches[i]] if patches.batches[i] >= 0 else ""
        dose = f"{patches.doses[i]:.6g}" if patches.doses[i] > 0 else ""
        rows.append([patches.classes[patches.labels[i]], batch, dose, patches.ids[i], patches.ids[j]])
    return rows

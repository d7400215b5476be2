"""Made phantom cells as a data set of compounds, doses and batches: written once, then read like any manifest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_text
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import derive_seed, numpy_generator
from cellflux_bridge.data.layout._made import Made
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.phantom.cells import CHANNELS, MAX_SIZE, MIN_SIZE, Batch, Effect, Measurement, make_cells
from cellflux_bridge.data.phantom.compounds import WIDTH, draw_compounds, response

CONTROL = "DMSO"
_TRUTH = (
    "path",
    *(f"effect_{name}" for name in Effect._fields),
    *(f"true_{name}" for name in Measurement._fields),
    *("batch_illumination", *(f"batch_gain_{name}" for name in CHANNELS), "batch_blur", "batch_background"),
)


class _Patch(NamedTuple):
    """A row of the manifest."""

    path: str
    label: str
    split: str
    group: str
    batch: str
    dose: str


class PhantomCells(Made):
    """Phantom fluorescence cells under compounds, made on first use under `data.root`.

    Channels are DNA, actin and tubulin. Every batch holds controls, `DMSO`, and each compound at each dose: `cmpd01`
    and so on, of which the last `num_unseen` are held out, all in split test, and lie between the others. A group is a
    well: one batch, compound, dose and split. Beside `manifest.csv` lie `embeddings.csv` and `moa.csv` of the
    compounds, and `truth.csv`: the effect, the main cell (as `measure` measures one) and the microscope of each patch.

    `num_train`, `num_val` and `num_test` are of each compound and dose, over all batches in turn;
    `num_controls_per_batch` is of each split.
    """

    def __init__(
        self,
        root: Path,
        *,
        size: Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)] = 48,
        num_compounds: Annotated[int, Field(ge=4, le=999)] = 8,
        num_unseen: Annotated[int, Field(ge=0, le=999)] = 3,
        doses: list[Annotated[float, Field(gt=0, le=1e6)]] = [0.1, 1.0, 10.0],  # noqa: B006 -- read only
        num_batches: Annotated[int, Field(ge=1, le=999)] = 4,
        num_train: Annotated[int, Field(ge=1)] = 100,
        num_val: Annotated[int, Field(ge=0)] = 8,
        num_test: Annotated[int, Field(ge=1)] = 40,
        num_controls_per_batch: Annotated[int, Field(ge=1)] = 100,
        seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0,
    ):
        if not doses or len({f"{dose:g}" for dose in doses}) < len(doses):
            raise UserError(f"data.layout.doses={doses}: expected one dose or more, each once")
        if min(num_train, num_test) < num_batches:
            raise UserError(
                f"data.layout: num_train={num_train} and num_test={num_test} leave batches without a compound; "
                f"expected at least num_batches={num_batches}"
            )
        settings = {"size": size, "num_compounds": num_compounds, "num_unseen": num_unseen, "doses": list(doses)}
        nums = {"train": num_train, "val": num_val, "test": num_test, "num_controls_per_batch": num_controls_per_batch}
        super().__init__(root, {"kind": "cells", **settings, "num_batches": num_batches, **nums, "seed": seed})

    def _write(self, folder: Path) -> None:
        settings, seed = self._settings, self._settings["seed"]
        compounds = draw_compounds(settings["num_compounds"], settings["num_unseen"], seed=seed)
        batches = {
            f"batch{n + 1}": _draw_batch(numpy_generator(seed, "batch", n)) for n in range(settings["num_batches"])
        }
        effects, largest = {(CONTROL, ""): Effect()}, max(settings["doses"])
        for number, name in enumerate(compounds.names):
            for dose in settings["doses"]:
                effects[name, f"{dose:g}"] = compounds.effect(number, response(dose, largest=largest))
        patches = list(self._patches(compounds.names, list(batches)))
        for parent in {(folder / patch.path).parent for patch in patches}:
            parent.mkdir(parents=True)
        jobs = (
            (folder / p.path, effects[p.label, p.dose], batches[p.batch], settings["size"], derive_seed(seed, p.path))
            for p in patches
        )
        made = progress(in_processes(_make_one, jobs), total=len(patches), desc="making phantom cells", unit="image")
        tables = {
            "truth.csv": [_TRUTH, *([patch.path, *row] for patch, row in zip(patches, made, strict=True))],
            "manifest.csv": [_Patch._fields, *patches],
            "embeddings.csv": [
                ["name", *(f"e{n}" for n in range(WIDTH))],
                *([name, *row] for name, row in zip(compounds.names, compounds.embeddings.tolist(), strict=True)),
            ],
            "moa.csv": [("name", "moa"), *zip(compounds.names, compounds.moas, strict=True)],
        }
        for name, rows in tables.items():
            (folder / name).write_text(csv_text(rows), encoding="utf-8", newline="")

    def _patches(self, names: list[str], batches: list[str]) -> Iterator[_Patch]:
        settings = self._settings
        for split in SPLITS:
            for batch in batches:
                for number in range(settings["num_controls_per_batch"]):
                    yield _patch(split, CONTROL, batch, "", number)
            for name in names[: None if split == "test" else settings["num_compounds"]]:
                for turn, dose in enumerate(settings["doses"]):
                    for number in range(settings[split]):
                        yield _patch(split, name, batches[(turn + number) % len(batches)], f"{dose:g}", number)


def _patch(split: str, label: str, batch: str, dose: str, number: int) -> _Patch:
    well = "_".join(filter(None, (batch, label, dose)))
    return _Patch(f"{split}/{label}/{well}_{number:05d}.npy", label, split, f"{well}_{split}", batch, dose)


def _draw_batch(seed: int, number: int) -> Batch:
    rng = numpy_generator(seed, "batch", number)
    gain = tuple(np.exp(rng.uniform(-0.3, 0.3, 3)).round(4).tolist())
    illumination, blur, background = (round(rng.uniform(*ends), 4) for ends in ((-0.5, 0.5), (0.4, 1.0), (3, 20)))
    return Batch(illumination, gain, blur, background)


def _make_one(job: tuple[Path, Effect, Batch, int, int]) -> list[float]:
    """A row of `_TRUTH`, without its path, of the image that it writes."""
    file, effect, batch, size, seed = job
    cells = make_cells(effect, batch, size=size, seed=seed)
    np.save(file, cells.image)
    row = (*effect, *cells.truth, batch.illumination, *batch.gain, batch.blur, batch.background)
    return [round(value, 6) for value in row]

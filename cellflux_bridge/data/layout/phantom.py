"""Made phantom tissue as a data set: written once as PNG files with a manifest, then read like any manifest."""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from cellflux_bridge.base.files import csv_text
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import derive_seed, numpy_generator
from cellflux_bridge.data.layout._made import Made
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.data.phantom.drawing import MIN_SIZE
from cellflux_bridge.images import write_png

_Count = Annotated[int, Field(ge=0)]
# Severities of class A and class B; the range between them is only ever drawn for the "range" folder.
SEVERITY = {"A": (0.0, 0.15), "B": (0.85, 1.0)}
# The same where a data set covers the whole range.
HALVES = {"A": (0.0, 0.5), "B": (0.5, 1.0)}
_COLUMNS = ("path", "label", "split", "score", "num_nuclei", "area_fraction")


class Phantom(Made):
    """Phantom H&E tissue: class A of severity near 0, class B near 1, made on first use under `data.root`.

    `num_range` more images cover the whole range of severity, the only ground truth for what lies between; they are
    written to `range/` with a table of their own and belong to no class, so that no training sees them.

    With `whole_range` every split covers severities 0 to 1 evenly, A being those below 0.5 and B the rest: a data set
    for judging (a severity regressor trained on its scores, real phantoms of every severity), made with another `seed`
    and under another root, and never one to train a bridge on: the problem is what lies between classes that are apart.
    """

    def __init__(
        self,
        root: Path,
        *,
        size: Annotated[int, Field(ge=MIN_SIZE, le=16_384)] = 64,
        num_train: Annotated[int, Field(ge=1)] = 1000,
        num_val: _Count = 100,
        num_test: _Count = 200,
        num_range: _Count = 300,
        seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0,
        whole_range: bool = False,
    ):
        nums = {"train": num_train, "val": num_val, "test": num_test, "range": num_range}
        # Without the whole range the stamp says nothing of it.
        settings = {"size": size, **nums, "seed": seed} | ({"whole_range": True} if whole_range else {})
        super().__init__(root, settings)

    def _write(self, folder: Path) -> None:
        jobs = self._jobs()
        for parent in {(folder / path).parent for path, *_ in jobs}:
            parent.mkdir(parents=True)
        made = in_processes(_make_one, ((folder, self._settings["size"], *job) for job in jobs))
        rows = list(progress(made, total=len(jobs), desc="making phantom tissue", unit="image"))
        for table, in_range in (("manifest.csv", False), ("range/range.csv", True)):
            chosen = [row for row in rows if (row[1] == "range") == in_range]
            if chosen:
                (folder / table).write_text(csv_text([_COLUMNS, *chosen]), encoding="utf-8", newline="")

    def _jobs(self) -> list[tuple[str, str, str, float, int]]:
        """Path, label, split, severity and seed of every image."""
        seed, jobs = self._settings["seed"], []
        for split in SPLITS:
            for label, (low, high) in (HALVES if "whole_range" in self._settings else SEVERITY).items():
                draw = numpy_generator(seed, "phantom", split, label)
                for number, severity in enumerate(draw.uniform(low, high, self._settings[split])):
                    path = f"{split}/{label}/{label}{number:05d}.png"
                    jobs.append((path, label, split, severity, derive_seed(seed, split, label, number)))
        for number, severity in enumerate(np.linspace(0, 1, self._settings["range"])):
            path = f"range/range{number:05d}.png"
            jobs.append((path, "range", "", float(severity), derive_seed(seed, "range", number)))
        return jobs


def _make_one(job: tuple[Path, int, str, str, str, float, int]) -> list:
    """A row of `_COLUMNS` for the image that it writes."""
    folder, size, path, label, split, severity, seed = job
    phantom = make_phantom(severity, size=size, seed=seed)
    write_png(folder / path, phantom.image)
    area_fraction = float((phantom.labels > 0).mean())
    return [path, label, split, round(severity, 6), len(phantom.areas), round(area_fraction, 6)]

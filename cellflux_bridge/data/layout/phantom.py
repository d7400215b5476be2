"""Made phantom tissue as a data set: written once as PNG files with a manifest, then read like any folder."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import derive_seed, numpy_generator
from cellflux_bridge.data.layout.base import PatchRecord
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.phantom import make_phantom
from cellflux_bridge.data.phantom.drawing import MIN_SIZE
from cellflux_bridge.images import write_png

_Count = Annotated[int, Field(ge=0)]
# Severities of class A and class B; the range between them is only ever drawn for the "range" folder.
SEVERITY = {"A": (0.0, 0.15), "B": (0.85, 1.0)}
# The same where a data set covers the whole range.
HALVES = {"A": (0.0, 0.5), "B": (0.5, 1.0)}


class Phantom(Folder):
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
        size: Annotated[int, Field(ge=MIN_SIZE)] = 64,
        num_train: Annotated[int, Field(ge=1)] = 1000,
        num_val: _Count = 100,
        num_test: _Count = 200,
        num_range: _Count = 300,
        seed: int = 0,
        whole_range: bool = False,
    ):
        super().__init__(root)
        self._settings = {
            "size": size,
            "train": num_train,
            "val": num_val,
            "test": num_test,
            "range": num_range,
            "seed": seed,
        }
        if whole_range:  # the stamp of other folders stays as it was
            self._settings["whole_range"] = True

    def records(self) -> list[PatchRecord]:
        """Every patch of the two classes, with its severity as score; makes the files if they are not there."""
        stamp = self.root / "phantom.json"
        if not stamp.exists():
            self._make()
        elif (found := _read_settings(stamp)) != self._settings:
            raise UserError(
                f"{self.root}: holds phantoms made with other settings ({json.dumps(found)}); "
                "remove the folder or choose another data.root"
            )
        return super().records()

    def _make(self) -> None:
        if self.root.exists() and any(self.root.iterdir()):
            raise UserError(f"{self.root}: is not empty and holds no phantoms; choose another data.root")
        building = self.root.with_name(f"{self.root.name}.making")
        shutil.rmtree(building, ignore_errors=True)
        jobs = self._jobs(building)
        for folder in {job[0].parent for job in jobs}:
            folder.mkdir(parents=True)
        made = in_processes(_make_one, jobs)
        rows = list(progress(made, total=len(jobs), desc="making phantom tissue", unit="image"))
        _write_table(building / "manifest.csv", [row for row in rows if row["label"] != "range"], building)
        _write_table(building / "range" / "range.csv", [row for row in rows if row["label"] == "range"], building)
        (building / "phantom.json").write_text(json.dumps(self._settings) + "\n")
        self.root.parent.mkdir(parents=True, exist_ok=True)
        if self.root.exists():
            self.root.rmdir()
        os.replace(building, self.root)

    def _jobs(self, folder: Path) -> list[tuple[Path, str, str, float, int, int]]:
        seed, size = self._settings["seed"], self._settings["size"]
        jobs = []
        for split in ("train", "val", "test"):
            for label, (low, high) in (HALVES if "whole_range" in self._settings else SEVERITY).items():
                draw = numpy_generator(seed, "phantom", split, label)
                for number, severity in enumerate(draw.uniform(low, high, self._settings[split])):
                    file = folder / split / label / f"{label}{number:05d}.png"
                    jobs.append((file, label, split, severity, size, derive_seed(seed, split, label, number)))
        for number, severity in enumerate(np.linspace(0, 1, self._settings["range"])):
            file = folder / "range" / f"range{number:05d}.png"
            jobs.append((file, "range", "", float(severity), size, derive_seed(seed, "range", number)))
        return jobs


def _read_settings(stamp: Path) -> dict[str, int]:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{stamp}: cannot be read ({error}); remove {stamp.parent} and it is made again") from error


def _make_one(job: tuple[Path, str, str, float, int, int]) -> dict[str, str | int | float | Path]:
    file, label, split, severity, size, seed = job
    phantom = make_phantom(severity, size=size, seed=seed)
    write_png(file, phantom.image)
    area_fraction = float((phantom.labels > 0).mean())
    return {
        "path": file,
        "label": label,
        "split": split,
        "score": round(severity, 6),
        "num_nuclei": len(phantom.areas),
        "area_fraction": round(area_fraction, 6),
    }


def _write_table(path: Path, rows: list[dict], root: Path) -> None:
    if not rows:
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "path": row["path"].relative_to(root).as_posix()} for row in rows)

"""What a report is made from: the figures, sequences and settings that run folders hold, and how they come together.

Runs of one transition make a chapter: their methods stand in the same tables. A figure of one network never stands in
the row of another's, so what does not compare is not compared.
"""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cellflux_bridge.config import Config, load_config
from cellflux_bridge.errors import UserError
from cellflux_bridge.metrics.results import FORMAT, FRAMES_SUFFIX
from cellflux_bridge.trajectory import HEADER, TrajectoryHeader, read_header

METRICS, CELLULARITY, VIDEO = "metrics.json", "cellularity.json", "interpolation.mp4"
_REAL = "real "
_COST = {"sequences": int, "seconds": float, "cpu_seconds": float}


@dataclass(frozen=True)
class Method:
    """One way of making sequences, or a baseline: `trajectory` is None for a baseline and where the folder is gone.

    `key` is its name in metrics.json, `name` what the report calls it, `slot` its place among the colours.
    """

    run: "Run"
    key: str
    name: str
    slot: int
    is_baseline: bool
    record: dict[str, Any]
    trajectory: Path | None
    header: TrajectoryHeader | None

    @cached_property
    def config(self) -> Config | None:
        """What made the sequences; None for a user's own frames."""
        path = self.trajectory and self.trajectory / "config.yaml"
        return load_config(path) if path and path.exists() else None

    @cached_property
    def cost(self) -> dict[str, float] | None:
        path = self.trajectory and self.trajectory / "cost.json"
        return read_json(path, _COST) if path and path.exists() else None

    @property
    def video(self) -> Path | None:
        path = self.trajectory and self.trajectory / VIDEO
        return path if path and path.exists() else None

    @cached_property
    def cellularity(self) -> dict[str, Any] | None:
        """Its entry in cellularity.json."""
        if self.trajectory is None or self.run.cellularity is None:
            return None
        same = (e for e in self.run.cellularity["trajectories"] if _same(Path(e["trajectory"]), self.trajectory))
        return next(same, None)

    def value(self, quantity: str, level: float | None = None, by: str = "") -> dict[str, Any] | None:
        return self.run.lookup.get((self.key, quantity, level, by))


@dataclass(frozen=True)
class Run:
    """A folder with metrics.json, and what lies beside it; `probabilities` are by (trajectory, source, judge)."""

    name: str
    folder: Path
    file: Path
    metrics: dict[str, Any]
    cellularity: dict[str, Any] | None

    @cached_property
    def lookup(self) -> dict[tuple, dict[str, Any]]:
        return {(v["method"], v["quantity"], v["level"], v["extractor"]): v for v in self.metrics["values"]}

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        return {network["name"]: network for network in self.metrics["networks"]}

    @cached_property
    def probabilities(self) -> dict[tuple[str, str, str], dict[float, float]]:
        """p(target) by level, of every frame that was judged; empty where evaluate left no such table."""
        path, found = self.file.with_suffix(FRAMES_SUFFIX), {}
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    of = found.setdefault((row["trajectory"], row["source_id"], row["judge"]), {})
                    of[float(row["level"])] = float(row["probability"])
        return found

    def methods(self, *, prefix: bool, first_slot: int = 0) -> list[Method]:
        """Methods in the order of metrics.json, baselines after them."""
        methods, slot = [], first_slot
        for record in self.metrics["methods"]:
            is_baseline = record["trajectory"] is None
            folder = None if is_baseline else self._find(Path(record["trajectory"]))
            header = None if folder is None else read_header(folder)
            name = f"{self.name}: {record['name']}" if prefix else record["name"]
            methods.append(Method(self, record["name"], name, slot, is_baseline, record, folder, header))
            slot += not is_baseline
        return methods

    def _find(self, recorded: Path) -> Path | None:
        """A trajectory as metrics.json names it, or the one of its name where the run was moved."""
        moved = (self.folder / recorded.name, self.folder / "trajectories" / recorded.name, self.folder)
        places = [recorded, *(place for place in moved if place.name == recorded.name)]
        return next((place for place in places if (place / HEADER).exists()), None)

    def real(self, which: str, quantity: str, by: str = "", level: float | None = None) -> dict[str, Any] | None:
        """A figure of real patches: `which` is source, target, pooled or scored."""
        return self.lookup.get((f"{_REAL}{which}", quantity, level, by))


@dataclass(frozen=True)
class Chapter:
    """Runs of one transition: `methods` of all of them, `baselines` once where they are the same."""

    source: str
    target: str
    runs: tuple[Run, ...]
    methods: tuple[Method, ...]
    baselines: tuple[Method, ...]

    @property
    def title(self) -> str:
        return f"{self.source} → {self.target}"


def read_json(path: Path, shape: dict[str, type]) -> dict[str, Any]:
    """A JSON object with the keys of `shape`; UserError names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and make it again") from error
    wrong = [key for key, kind in shape.items() if not isinstance(data, dict) or not isinstance(data.get(key), kind)]
    if wrong or not isinstance(data, dict):
        raise UserError(f"{path}: expected an object with {', '.join(shape)}; {', '.join(wrong)} missing or wrong")
    return data


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (not one.exists() and one.name == other.name)


def _newest(folder: Path, name: str) -> Path | None:
    found = [folder / name] if (folder / name).exists() else list(folder.glob(f"trajectories/*/{name}"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def load_run(folder: Path, *, name: str) -> Run:
    """Read a run folder (or a trajectory folder, or any folder with metrics.json).

    Raises UserError for a folder without metrics.json, naming the command that writes it, and for damaged files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run folder")
    file = _newest(folder, METRICS)
    if file is None:
        raise UserError(
            f"{folder}: holds no {METRICS}, on which a report rests; make it with: cellflux-bridge evaluate "
            f"TRAJECTORY ... --judge RUN --features RUN --output {folder / METRICS}"
        )
    metrics = read_json(file, {"format": int, "networks": list, "methods": list, "values": list, "differences": list})
    if metrics["format"] != FORMAT:
        raise UserError(
            f"{file}: format {metrics['format']}, this version reads {FORMAT}; run `cellflux-bridge evaluate` again"
        )
    counted = _newest(folder, CELLULARITY)
    cellularity = None if counted is None else read_json(counted, {"trajectories": list, "real": list})
    return Run(name, folder, file, metrics, cellularity)


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return [n if short.count(n) == 1 else os.fspath(f) for n, f in zip(short, folders, strict=True)]


def load_chapters(folders: Sequence[Path]) -> list[Chapter]:
    """The chapters of a report, in the order in which their first runs are named."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    runs = [load_run(folder, name=name) for folder, name in zip(folders, _names(folders), strict=True)]
    together: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        together.setdefault((run.metrics["source"], run.metrics["target"]), []).append(run)
    return [_chapter(source, target, tuple(of)) for (source, target), of in together.items()]


def _chapter(source: str, target: str, runs: tuple[Run, ...]) -> Chapter:
    methods, baselines, known = [], [], []
    for run in runs:
        for method in run.methods(prefix=len(runs) > 1, first_slot=len(methods)):
            if not method.is_baseline:
                methods.append(method)
                continue
            figures = [{**v, "trajectory": ""} for v in run.metrics["values"] if v["method"] == method.key]
            told = (method.key, figures, run.metrics["networks"])
            if told not in known:
                known.append(told)
                baselines.append(method)
    return Chapter(source, target, runs, tuple(methods), tuple(baselines))

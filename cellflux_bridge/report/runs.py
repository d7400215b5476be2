"""The material of a report: figures, sequences and settings of run folders.

Runs of one transition and image size make a chapter: their methods stand in the same tables. Figures of different
networks stand in different rows, because they do not compare.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_rows
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.metrics.cost import Cost, read_cost
from cellflux_bridge.metrics.results import FRAMES_SUFFIX
from cellflux_bridge.report import reading
from cellflux_bridge.trajectory import HEADER, TrajectoryHeader, read_header

METRICS, CELLULARITY, VIDEO = "metrics.json", "cellularity.json", "interpolation.mp4"
# Of cellularity.json: nuclei_<quantity>, and its rank correlation with the level, nuclei_<quantity>_rank.
NUCLEI, RANK = "nuclei_", "_rank"


class Network(NamedTuple):
    """The key of a row: two runs share a row only where name and weights of the network are the same."""

    name: str
    weights: str


@dataclass(frozen=True)
class Method:
    """One way of making sequences, or a baseline: `trajectory` is None for a baseline and where the folder is gone.

    `name` is what the report calls it, `slot` its place among the colours.
    """

    run: "Run"
    record: reading.MethodRecord
    name: str
    slot: int
    trajectory: Path | None
    header: TrajectoryHeader | None

    @property
    def key(self) -> str:
        """Its name in metrics.json."""
        return self.record.name

    @property
    def is_baseline(self) -> bool:
        return self.record.trajectory is None

    @cached_property
    def config(self) -> Config | str | None:
        """What made the sequences, or why it cannot be read; None for a user's own frames."""
        return self.trajectory and config_of(self.trajectory)

    @cached_property
    def cost(self) -> Cost | None:
        return self.trajectory and read_cost(self.trajectory)

    @property
    def video(self) -> Path | None:
        return self.trajectory and file_inside(self.trajectory, VIDEO)

    @cached_property
    def cellularity(self) -> reading.CountedTrajectory | None:
        """Its entry in cellularity.json."""
        if self.trajectory is None or self.run.cellularity is None:
            return None
        same = (of for of in self.run.cellularity.trajectories if _same(Path(of.trajectory), self.trajectory))
        return next(same, None)

    @cached_property
    def nuclei(self) -> dict[tuple[str, float | None], reading.Figure]:
        """Its figures of cellularity.json by (quantity, level); a rank correlation has no level."""
        counted = self.cellularity
        figures = {(f"{NUCLEI}{f.quantity}", f.level): f for f in counted.curves} if counted else {}
        return figures | {(f"{NUCLEI}{f.quantity}{RANK}", None): f for f in (counted.spearman if counted else ())}

    def value(self, quantity: str, level: float | None = None, by: str = "") -> reading.Figure | None:
        return self.run.lookup.get((self.key, quantity, level, by)) or self.nuclei.get((quantity, level))


@dataclass(frozen=True)
class Run:
    """A folder with metrics.json, and what lies beside it; `probabilities` are by (trajectory, source, judge)."""

    name: str
    folder: Path
    file: Path
    metrics: reading.Metrics
    cellularity: reading.Cellularity | None

    @cached_property
    def lookup(self) -> dict[tuple, reading.Figure]:
        found = {(f.method, f.quantity, f.level, f.extractor): f for f in self.metrics.values}
        for f in (*self.cellularity.real, *self.cellularity.real_by_level) if self.cellularity else ():
            which = {self.metrics.source: "source", self.metrics.target: "target", "": "scored"}.get(f.label)
            found[f"real {which}", f"{NUCLEI}{f.quantity}", f.level, ""] = f
        return found

    @cached_property
    def networks(self) -> dict[str, reading.NetworkRecord]:
        return {network.name: network for network in self.metrics.networks}

    @property
    def judges(self) -> list[str]:
        return [network.name for network in self.metrics.networks if network.use == "judge"]

    @property
    def extractor(self) -> str:
        return next((network.name for network in self.metrics.networks if network.use == "features"), "")

    @property
    def size(self) -> int:
        """The side of its frames, px: evaluate takes only judges of that size."""
        return self.networks[self.judges[0]].image_size

    @property
    def near_copies(self) -> tuple[reading.NearCopyRecord, ...]:
        return self.metrics.memorisation.near_copies if self.metrics.memorisation else ()

    def network(self, name: str) -> Network:
        found = self.networks.get(name)
        return Network(name, (found.digest or found.checkpoint) if found else "")

    @cached_property
    def probabilities(self) -> dict[tuple[str, str, str], dict[float, float]]:
        """p(target) by level, of every frame that was judged; empty where evaluate left no such table."""
        path, found = self.file.with_suffix(FRAMES_SUFFIX), {}
        try:
            for row in csv_rows(path) if path.exists() else ():
                of = found.setdefault((row["trajectory"], row["source_id"], row["judge"]), {})
                of[float(row["level"])] = float(row["probability"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); make it again with: cellflux-bridge evaluate") from error
        return found

    def methods(self, *, prefix: bool, first_slot: int = 0) -> list[Method]:
        """Methods and baselines in the order of metrics.json."""
        methods, slot = [], first_slot
        for record in self.metrics.methods:
            folder = record.trajectory and self._find(Path(record.trajectory))
            name = f"{self.name}: {record.name}" if prefix else record.name
            methods.append(Method(self, record, name, slot, folder, folder and read_header(folder)))
            slot += record.trajectory is not None
        return methods

    def _find(self, recorded: Path) -> Path | None:
        """A trajectory as metrics.json names it, or the one of its name where the run was moved."""
        moved = (self.folder / recorded.name, self.folder / "trajectories" / recorded.name, self.folder)
        places = [recorded, *(place for place in moved if place.name == recorded.name)]
        return next((place for place in places if os.path.isfile(place / HEADER)), None)

    def real(self, which: str, quantity: str, by: str = "", level: float | None = None) -> reading.Figure | None:
        """A figure of real patches: `which` is source, target, pooled, scored, or own (of a level)."""
        return self.lookup.get((f"real {which}", quantity, level, by))


@dataclass(frozen=True)
class Chapter:
    """Runs of one transition and frames of one `size`: `methods` of all of them, `baselines` once where they are the
    same; `title` tells the size where chapters differ in nothing else."""

    source: str
    target: str
    size: int
    title: str
    runs: tuple[Run, ...]
    methods: tuple[Method, ...]
    baselines: tuple[Method, ...]

    def of_run(self, run: Run) -> str:
        """What a sentence about one run begins with; nothing where there is no other."""
        return f"{run.name}: " if len(self.runs) > 1 else ""

    def called(self, network: Network) -> str:
        """A network's name, with its runs where another network of the chapter has it, too."""
        of = {run.name: run.network(network.name) for run in self.runs if network.name in run.networks}
        if len(set(of.values())) < 2:
            return network.name
        return f"{network.name} of {', '.join(name for name, each in of.items() if each == network)}"


def file_inside(folder: Path, name: str) -> Path | None:
    """A file of a folder; None where it is missing or a link to somewhere else."""
    path = folder / name
    inside = os.path.isfile(path) and path.resolve().is_relative_to(folder.resolve())
    return path if inside else None


def config_of(folder: Path) -> Config | str | None:
    """The configuration in a trajectory's or checkpoint's folder, or why it cannot be read; None where there is none.

    Foreign modules that it names are not imported, unless the user trusts the run (`--trust`).
    """
    path = file_inside(folder, "config.yaml")
    try:
        return path and load_config(path)
    except UserError as error:
        return str(error)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other) or (not os.path.exists(one) and one.name == other.name)


def _newest(folder: Path, name: str) -> Path | None:
    found = [folder / name] if (folder / name).exists() else list(folder.glob(f"trajectories/*/{name}"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def is_evaluated(folder: Path) -> bool:
    return _newest(folder, METRICS) is not None


def load_run(folder: Path, name: str) -> Run:
    """Read a run folder (or a trajectory folder, or any folder with metrics.json).

    Raises UserError for a folder without metrics.json, naming the command that writes it, and for damaged files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run folder")
    file = _newest(folder, METRICS)
    if file is None:
        raise UserError(
            f"{folder}: holds no {METRICS}, on which a report rests; make it with: cellflux-bridge evaluate "
            f"TRAJECTORY ... --judge RUN --features RUN --output {folder / METRICS}; for cells under perturbations "
            f"cellflux-bridge perturbations {folder} is enough"
        )
    metrics, counted = reading.read(file, reading.Metrics), _newest(folder, CELLULARITY)
    if not any(network.use == "judge" for network in metrics.networks):
        raise UserError(f"{file}: names no judge among its networks; evaluate again with --judge")
    return Run(name, folder, file, metrics, counted and reading.read(counted, reading.Cellularity))


def load_chapters(folders: Sequence[Path]) -> list[Chapter]:
    """The chapters of a report, in the order in which their first runs are named."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else os.fspath(of) for name, of in zip(short, folders, strict=True)]
    together: dict[tuple[str, str, int], list[Run]] = {}
    for run in map(load_run, folders, names):
        together.setdefault((run.metrics.source, run.metrics.target, run.size), []).append(run)
    titles = Counter((source, target) for source, target, _ in together)
    return [_chapter(*key, tuple(runs), with_size=titles[key[:2]] > 1) for key, runs in together.items()]


def _chapter(source: str, target: str, size: int, runs: tuple[Run, ...], *, with_size: bool) -> Chapter:
    methods, baselines = [], {}
    for run in runs:
        found = run.methods(prefix=len(runs) > 1, first_slot=len(methods))
        methods += [method for method in found if not method.is_baseline]
        for method in (method for method in found if method.is_baseline):
            # Baselines of two runs are one where their figures are the same.
            figures = tuple(figure for figure in run.metrics.values if figure.method == method.key)
            baselines.setdefault((method.key, figures, run.metrics.networks), method)
    title = f"{source} → {target}" + (f", {size} px" if with_size else "")
    return Chapter(source, target, size, title, runs, tuple(methods), tuple(baselines.values()))

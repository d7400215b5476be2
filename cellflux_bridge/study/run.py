"""A study run: guides, generators, cells, each a job with a folder of its own, over processes or a SLURM cluster."""

import multiprocessing
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.base.locks import writing
from cellflux_bridge.base.parallel import in_processes
from cellflux_bridge.base.progress import progress
from cellflux_bridge.config import Config
from cellflux_bridge.data.index import patch_index
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.study import plan
from cellflux_bridge.study.backbones import PRESETS, Backbone, require_weights
from cellflux_bridge.study.cell import run_cell
from cellflux_bridge.study.leaks import require_no_leak
from cellflux_bridge.study.results import finished
from cellflux_bridge.study.settings import StudyConfig
from cellflux_bridge.study.summary import write_summary
from cellflux_bridge.training.loop import Stopped
from cellflux_bridge.training.run import claim

# Trains the generator of a YAML file and translates in directions; a guide is trained alone, without directions.
Make = Callable[[Path, str, Sequence[tuple[str, str]]], None]


def dry_run(config: StudyConfig) -> list[str]:
    """`describe`, of a study that was begun with what it leaves out."""
    return describe(require_no_leak(config)[0] if (config.output / "checks.txt").exists() else config)


def describe(config: StudyConfig) -> list[str]:
    """What a study will do and what it costs, in lines."""
    index, lines = patch_index(config.data, seed=config.seed), []
    for size in config.sizes:
        groups = set(plan.training_groups(config, size))
        is_of = np.isin([name.rpartition("\0")[2] for name in index.group_names], list(groups))[index.groups]
        rows = is_of & (index.splits == SPLITS.index("train"))
        counts = Counter(index.classes[label] for label in index.labels[rows])
        lines.append(f"size {size}: {len(groups)} groups, " + ", ".join(f"{n} {label}" for label, n in counts.items()))
    for making in plan.makings(config):
        made = plan.generator_config(config, making)
        if config.generators[making.generator].kind == "flow":
            updates = f"{made.train.steps} updates"
            updates += f", {made.shortcut.train.steps} of its shortcuts" if made.shortcut.steps else ""
            updates += f", {made.refiner.train.steps} of its refiner" if made.refiner.scale else ""
        else:
            updates = f"{made.ddim.denoiser.train.steps} updates"
        lines.append(f"generator {making.generator}, size {making.size}: {updates}")
    cells, steps = list(plan.cells(config)), config.train.steps
    lines.append(
        f"{len(cells)} cells ({len(config.arms)} arms, {len(config.backbones)} backbones, {len(config.sizes)} sizes, "
        f"{config.seeds} seeds) of {steps} updates of {config.train.batch_size} patches"
    )
    seconds = [result["seconds"] for result in finished(config).values()]
    if seconds:
        left = (len(cells) - len(seconds)) * np.mean(seconds)
        lines.append(
            f"done: {len(seconds)}, {np.mean(seconds):.0f} s each; left: about {left / 60:.0f} minutes of one process"
        )
    return lines


def _require_buildable(config: StudyConfig) -> None:
    """UserError, before anything is trained, for a backbone or a generator that cannot be built."""
    classes = len(patch_index(config.data, seed=config.seed).classes)
    if config.data.channels != 3:
        raise UserError(f"data.channels={config.data.channels}: a study is of RGB images only")
    with torch.device("meta"):
        for backbone in config.backbones.values():
            require_weights(backbone)
            if backbone.name not in PRESETS and ":" not in backbone.name:  # of others weights tell what they are
                untrained = backbone.model_copy(update={"pretrained": False, "weights": None, "frozen": False})
                Backbone(untrained, classes, patch_size=config.data.image_size)
        for making in plan.makings(config):
            kind, found = config.generators[making.generator].kind, plan.generator_config(config, making)
            if kind == "flow":
                build_flow(found)
            if (form := found.translate.guidance.form) in ("score", "bridge", "sharpen"):
                raise UserError(
                    f"generators.{making.generator}: translate.guidance.form={form} asks a guide of states, which a "
                    "study does not train; set endpoint or none"
                )


def run_study(config: StudyConfig, make: Make, *, workers: int, slurm: Mapping[str, Any] | None) -> list[Path]:
    """Do what is not done yet, then write the tables and figures of what is there; returns these.

    `make` trains generators. Raises UserError for a leak before anything is trained, and at the end where jobs failed.
    The next call does these again, and what was made with other settings: arms, sizes and seeds may be added.
    """
    _require_buildable(config)
    if any((config.output / name).exists() for name in ("checkpoints", "trajectories")):
        raise UserError(f"{config.output}: holds a run; choose another output for the study")
    config.output.mkdir(parents=True, exist_ok=True)
    with writing(config.output):
        claim(config.output, config)
        config, lines = require_no_leak(config)
        print("\n".join([*lines, *describe(config)]), flush=True)
        replace_text(config.output / "checks.txt", "\n".join(lines) + "\n")
        run = partial(_run, workers=workers or _num_workers(config), slurm=slurm, logs=config.output / "slurm")
        failed = run(partial(_make_guide, config, make), config.sizes, desc="guides")
        failed += run(partial(_make_generator, config, make), plan.makings(config), desc="generators")
        done = finished(config)
        todo = [cell for cell in plan.cells(config) if cell not in done]
        failed += run(partial(_run_cell, config), todo, desc="cells")
        written = write_summary(config)
    if failed:
        raise UserError(f"{len(failed)} jobs failed; the same command does them again: {abbreviate(failed, limit=5)}")
    return written


def _num_workers(config: StudyConfig) -> int:
    """One process a core; one alone where a GPU does the work."""
    on_gpu = config.train.accelerator not in ("cpu", "auto") or (config.train.accelerator == "auto" and _has_gpu())
    return 1 if on_gpu else os.cpu_count() or 1


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _run(
    work: Callable, items: Sequence, *, workers: int, slurm: Mapping[str, Any] | None, logs: Path, desc: str
) -> list[str]:
    """`work` of every item, by processes or as a SLURM array, under one bar; what failed, with its reason."""
    if not items:
        return []
    results = _over_slurm(work, items, slurm, logs) if slurm is not None else _over_processes(work, items, workers)
    return [error for error in progress(results, total=len(items), desc=desc, unit="job", smoothing=0) if error]


def _over_processes(work: Callable, items: Sequence, workers: int) -> Iterator[str | None]:
    yield from in_processes(work, items, workers=min(workers, len(items)), spawn=True, chunk=1)


def _over_slurm(work: Callable, items: Sequence, options: Mapping[str, Any], logs: Path) -> Iterator[str | None]:
    try:
        import submitit
    except ImportError as error:
        raise UserError("--slurm: submitit is not installed; run: pip install 'cellflux-bridge[slurm]'") from error
    options = dict(options)
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=options.pop("cluster", None))
        executor.update_parameters(**options)
    except (RuntimeError, TypeError, ValueError, NameError) as error:
        raise UserError(f"--slurm: {error}; expected submitit's parameters, as in slurm_partition=gpu") from error
    for job in executor.map_array(work, items):
        try:
            yield job.result()
        except Exception as error:  # killed, out of time, or its node was lost
            yield f"job {job.job_id}: {error!s:.300}"


def _attempt(folder: Path, name: str, work: Callable[[], None]) -> str | None:
    """None where `work` was done, else what failed; what it printed goes to log.txt, a reason to error.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            work()
    except (Exception, SystemExit) as error:
        if isinstance(error, Stopped) and multiprocessing.parent_process() is None:
            raise  # the user stops the study
        reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
        replace_text(folder / "error.txt", reason + "\n")
        return f"{name}: {reason.strip().splitlines()[-1]}"
    (folder / "error.txt").unlink(missing_ok=True)
    return None


def _make_guide(config: StudyConfig, make: Make, size: plan.Size) -> str | None:
    folder = plan.size_folder(config, size) / plan.GUIDE
    key = plan.guide_key(config, size)
    work = partial(_make_once, make, plan.guide_config(config, size), "guide", [], key, folder)
    return _attempt(folder, f"guide of size {size}", work)


def _make_generator(config: StudyConfig, make: Make, making: plan.Making) -> str | None:
    found, kind = plan.generator_config(config, making), config.generators[making.generator].kind
    key, pairs = plan.generator_key(config, making), plan.directions(config, making)
    work = partial(_make_once, make, found, kind, pairs, key, found.output)
    return _attempt(found.output, f"{making.generator} of size {making.size}", work)


def _make_once(make: Make, config: Config, kind: str, pairs: Sequence[tuple[str, str]], key: str, folder: Path) -> None:
    """Make what is not made yet. `key` says with what: a folder that was begun with something else is emptied first,
    one that was begun with the same is gone on with."""
    begun, done = folder / plan.BEGUN, folder / plan.DONE
    if done.exists() and done.read_text(encoding="utf-8") == key:
        return
    done.unlink(missing_ok=True)
    if not begun.exists() or begun.read_text(encoding="utf-8") != key:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "log.txt":
                path.unlink()
        replace_text(begun, key)
    file = folder.with_name(f"{folder.name}.yaml")
    replace_text(file, config.to_yaml())
    make(file, kind, pairs)
    replace_text(done, key)


def _run_cell(config: StudyConfig, cell: plan.Cell) -> str | None:
    name = "/".join(map(str, cell))
    return _attempt(plan.cell_folder(config, cell), f"cell {name}", lambda: run_cell(config, cell))

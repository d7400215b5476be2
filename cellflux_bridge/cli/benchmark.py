"""`cellflux-bridge benchmark`"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration


def run(args: argparse.Namespace) -> None:
    """benchmark quality CONFIG --variant "name: key=value ...": how much work recipes need for pictures like real ones.

    Trains every variant for every number of updates with every seed, turn by turn, and asks how well unguided images of
    level 1 are told from real test patches; with pairs.match_batch, how well treated cells, made as `perturbations`
    makes them, are told from real ones. Runs that are there are used again. Work is updates, training FLOP (torch's
    counter), and CPU seconds beside this machine's own rate of matrix products.
    """
    from cellflux_bridge.base.files import csv_text, replace_text

    if args.sources < 10 or min(args.updates) < 1 or args.seeds < 1:
        raise UserError("--sources, --updates, --seeds: expected at least 10, 1 and 1")
    variants = dict(map(_variant, args.variant or ["as it is:"]))
    folder = args.output or Path("runs/benchmark_quality")
    # Every variant is read before anything is trained.
    configs = {name: configuration(args.config, [*args.overrides, *keys]) for name, keys in variants.items()}
    by_level = {name: config for name, config in configs.items() if not config.pairs.match_batch}
    if wrong := [name for name, config in by_level.items() if config.translate.method != "progression"]:
        raise UserError(f"--variant {wrong[0]}: expected translate.method=progression, whose level 1 stands by itself")
    rate, rows = _matrix_rate(), []
    print(f"matrix products: {rate:.0f} GFLOP/s", flush=True)
    for seed, updates, name in itertools.product(range(args.seeds), args.updates, variants):
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        output = folder / f"{safe}-{updates}-{seed}"
        keys = [*args.overrides, *variants[name], f"seed={seed}", f"train.steps={updates}", f"output={output}"]
        row = {"variant": name, "seed": seed, "updates": updates, "gflop_per_s": rate}
        row |= _measured(configuration(args.config, keys), args.config, keys, num=args.sources)
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "quality.csv", csv_text([list(rows[0]), *(list(each.values()) for each in rows)]))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)


def _variant(text: str) -> tuple[str, list[str]]:
    name, colon, keys = text.partition(":")
    if not (name.strip() and colon):
        raise UserError(f'--variant {text!r}: expected "name: key=value ...", as in "adamw: train.optimiser=adamw"')
    return name.strip(), keys.split()


def _matrix_rate() -> float:
    """GFLOP/s of a product of square matrices in single precision, the best of five."""
    import torch

    a, best = torch.randn(1024, 1024), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def _measured(config: Any, file: str, keys: list[str], *, num: int) -> dict[str, float]:
    """Train a run, and what it cost and gave."""
    from torch.utils.flop_counter import FlopCounterMode

    from cellflux_bridge.api import Bridge
    from cellflux_bridge.cli import train
    from cellflux_bridge.flow.shortcut import SHORTCUT, ShortcutTask
    from cellflux_bridge.flow.task import FlowTask
    from cellflux_bridge.metrics.level_one import ALONE, level_one
    from cellflux_bridge.metrics.sliced_wasserstein import swd
    from cellflux_bridge.metrics.two_sample import network_scores, two_sample
    from cellflux_bridge.refiner.model import REFINER
    from cellflux_bridge.refiner.task import RefinerTask
    from cellflux_bridge.training.run import last_values

    train.run(argparse.Namespace(config=file, overrides=keys))
    bridge = Bridge.load(config.output, () if config.pairs.match_batch else ALONE)
    trained, work, cpu_seconds = bridge.config, 0.0, 0.0
    parts = [(FlowTask, trained.train, config.output)]
    if trained.shortcut.steps:
        parts.append((ShortcutTask, trained.shortcut.train, config.output / SHORTCUT))
    if trained.refiner.scale:
        parts.append((RefinerTask, trained.refiner.train, config.output / REFINER))
    for kind, how, folder in parts:
        task = kind(trained, bridge.patches())
        with FlopCounterMode(display=False) as counter:
            task.loss(task.model, task.batch(0, rank=0)).backward()
        work += counter.get_total_flops() * how.accumulate * how.steps / 1e12
        cpu_seconds += last_values(folder, "cpu_seconds")["cpu_seconds"]
    if config.pairs.match_batch:
        found = _treated(bridge, config.output / f"treated-{num}", num=num)
    else:
        found = level_one(bridge, split="test", num=num)
    sides = found.made, found.real, found.groups, found.real_groups
    return {
        "tflop": work,
        "cpu_seconds": cpu_seconds,
        **{f"auc_{kind}": value for kind, value in found.auc().items()},
        "auc_network": two_sample(*sides, scores_of=network_scores).value,
        **found.by_nuclei(bridge.patches()),
        **{f"swd_{scale}": value for scale, value in swd(found.made, found.real).items()},
    }


def _treated(bridge: Any, folder: Path, *, num: int) -> Any:
    """About `num` real treated cells of the test split, as many of each perturbation, and for each a cell that a run
    makes of a control, as a LevelOne; `folder` keeps the made ones."""
    import numpy as np

    from cellflux_bridge.metrics.level_one import LevelOne
    from cellflux_bridge.translation.perturbation import control_class, make_treated, match_controls

    patches, config, control = bridge.patches(), bridge.config, control_class(bridge)
    targets = [label for label in patches.classes if label != control and bridge.can_make(label)]
    how = {"split": "test", "pairs": config.pairs, "seed": config.seed}
    matched = match_controls(patches, control, targets, num=-(-num // max(1, len(targets))), **how)
    made, names = make_treated(bridge, patches, matched, folder), np.array(patches.group_names)
    groups = (names[patches.groups[of]] for of in (matched.control, matched.treated))
    return LevelOne(np.array(made), patches.centre(matched.treated).numpy(), *groups)

"""`cellflux-bridge classify`"""

import argparse
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration, trajectory_folder


def run(args: argparse.Namespace) -> None:
    """classify TRAJECTORY_OR_RUN: how many frames judges call the target class, beside a mere recolouring."""
    import json
    from dataclasses import asdict

    from cellflux_bridge import checkpoint
    from cellflux_bridge.base.files import replace_text
    from cellflux_bridge.metrics.classify import classify
    from cellflux_bridge.training.processes import make_fabric
    from cellflux_bridge.trajectory import read_header

    folder = trajectory_folder(args.config)
    header = read_header(folder)
    runs = args.classifier or sorted(map(str, Path(args.config).glob("judge_*")))
    if not runs:
        raise UserError(
            "--classifier: none given, and the run has none; train one with: cellflux-bridge train-classifier"
        )
    judge = configuration(checkpoint.latest(Path(runs[0])), args.overrides)
    fabric = make_fabric(judge.classifier.train, section="classifier.train")
    found = classify(folder, [Path(run) for run in runs], overrides=args.overrides, device=fabric.device)
    results = []
    for run, one in zip(runs, found, strict=True):
        results.append(one)
        print(f"{run}: {one['view']}, accuracy {one['test/accuracy']:.3f} on {one['test/n']} real patches")
        print(f"  fraction called {header.target} of {one['num_sequences']} sequences")
        print(f"    untranslated {header.source:<18} {one['fraction'][0]:.3f}")
        print(f"    Reinhard colour transfer       {one['reinhard']:.3f}")
        print(f"    translated (level 1)           {one['fraction'][-1]:.3f}")
        levels = "  ".join(f"{level:.2f}:{p:.2f}" for level, p in zip(one["levels"], one["probability"], strict=True))
        print(f"    mean probability by level      {levels}")
    replace_text(folder / "classification.json", json.dumps({**asdict(header), "judges": results}, indent=1) + "\n")
    print(f"wrote: {folder / 'classification.json'}")

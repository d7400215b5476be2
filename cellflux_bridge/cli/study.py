"""`cellflux-bridge study`"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.parse import parse
from cellflux_bridge.cli.places import configuration, tell_written

_TRAINS = {"guide": "train-classifier", "flow": "train", "ddim": "train-ddim"}


def make(file: Path, kind: str, directions: Sequence[tuple[str, str]]) -> None:
    """Train what a YAML file says, and carry its training patches in `directions`."""
    from cellflux_bridge.config.registry import trusting

    lines = [(_TRAINS[kind], str(file))]
    with trusting(False):  # what the user's own file names is then accepted in the run made from it
        run = configuration(file, ()).output
        for number, (source, target) in enumerate(directions):
            place = str(run / "made" / str(number))
            lines.append(("translate", str(run), f"--source={source}", f"--target={target}", "--output", place))
        for line in lines:
            _, function, args = parse(line)
            function(args)


def run(args: argparse.Namespace) -> None:
    """study STUDY.yaml: do stairs make better classifiers? Arms of augmentation compared; a stopped study goes on.

    Trains generators on each size of the training set, then a classifier for every arm, backbone, size and seed, and
    writes tables and figures. Cells that are done are not done again.
    """
    from cellflux_bridge.config import load_config, parse_overrides
    from cellflux_bridge.study.run import dry_run, run_study
    from cellflux_bridge.study.settings import StudyConfig

    path = Path(args.config)
    if path.is_dir() or path.name == "config.yaml":  # it may come from somebody else, and names files that are trusted
        raise UserError(
            f"{path}: expected the YAML file that the study was begun with, as in configs/study_example.yaml"
        )
    config = load_config(path, args.overrides, schema=StudyConfig).beside(path.parent)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected a number of processes, or 0 for one a core")
    if args.dry_run:
        print("\n".join(dry_run(config)))
        return
    slurm = None if args.slurm is None else parse_overrides(args.slurm)
    tell_written(run_study(config, make, workers=args.workers, slurm=slurm))
    print((config.output / "study.md").read_text(encoding="utf-8").split("\n\n")[1])

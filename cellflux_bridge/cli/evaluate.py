"""`cellflux-bridge evaluate`"""

import argparse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import tell_written, trajectories_and_overrides, trajectory_folder


def run(args: argparse.Namespace) -> None:
    """evaluate TRAJECTORY_OR_RUN ...: compare methods: fidelity, calibration, preservation, cost."""
    from cellflux_bridge.trajectory import read_header

    folders, overrides = trajectories_and_overrides(args)
    for folder in folders:  # runs that are missing or unfit are told before flags that are
        read_header(folder)
    missing = [flag for flag, given in (("--judge", args.judge), ("--features", args.features)) if not given]
    told = UserError(
        f"{' and '.join(missing)}: not given; name runs of classifiers (cellflux-bridge train-classifier), or "
        "for H&E --features nuclei. Guide, judges and --features must be different networks"
    )
    if not args.judge:
        raise told
    from cellflux_bridge import checkpoint
    from cellflux_bridge.base.files import require_json
    from cellflux_bridge.metrics.evaluate import evaluate
    from cellflux_bridge.metrics.loading import judge_config
    from cellflux_bridge.metrics.results import write_results
    from cellflux_bridge.training.processes import make_fabric

    judges = [judge_config(checkpoint.latest(run), overrides) for run in args.judge]
    if missing:
        raise told
    output = args.output or folders[0] / "metrics.json"
    require_json(output)
    fabric = make_fabric(judges[0].classifier.train, section="classifier.train")
    evaluation = evaluate(
        folders,
        judges=args.judge,
        features=args.features,
        scores=args.scores,
        cycle=None if args.cycle is None else trajectory_folder(args.cycle),
        unguided=[trajectory_folder(text) for text in args.unguided],
        num_levels=args.levels,
        max_real=args.max_real,
        overrides=overrides,
        device=fabric.device,
        cache=output.with_suffix(".cache"),
    )
    files, table = write_results(evaluation, output)
    print(table)
    tell_written(files)

"""`cellflux-bridge run`"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.parse import parse
from cellflux_bridge.cli.places import configuration


def perturbation_stages(config: str, overrides: Sequence[str], output: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`stages` of treated cells, which are compared with real ones perturbation by perturbation."""
    run, features = str(output), output / "features"
    judge = ("train-classifier", config, *overrides, "classifier.role=judge", f"output={features}")
    return (
        ("training the flow", ("train", config, *overrides)),
        ("translating held-out controls", ("translate", run, *overrides, "--overwrite")),
        ("video", ("video", run, *overrides)),
        ("training a classifier of perturbations, for distances", judge),
        ("making treated cells, beside real ones", ("perturbations", run, "--features", str(features / "judge_rgb"))),
        ("report", ("report", run)),
    )


def stages(
    config: str, overrides: Sequence[str], output: Path, *, seed: int = 0, features: str | None = None
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What is done from patches to report: a title and the command line of each step, in their order.

    Distances are those in `features`, by default in a third classifier, which is trained for them. `seed` is that of
    the judges; the third classifier has the next one.
    """
    run, judges = str(output), [str(output / f"judge_{view}") for view in ("rgb", "grey")]
    classifier, third = ("train-classifier", config, *overrides), output / "features"
    judge = (*classifier, "classifier.role=judge", "classifier.sees=image")
    for_distances = (
        "training a third classifier, for distances",
        (*judge, "classifier.view=rgb", f"classifier.seed={seed + 1}", f"output={third}"),
    )
    return (
        ("training the flow", ("train", config, *overrides)),
        ("training the guide, which steers", (*classifier, "classifier.role=guide")),
        ("translating held-out patches", ("translate", run, *overrides, "--overwrite")),
        ("video", ("video", run, *overrides)),
        ("training the judge of colour and structure", (*judge, "classifier.view=rgb")),
        ("training the judge of structure", (*judge, "classifier.view=grey")),
        *([] if features else [for_distances]),
        ("asking the judges", ("classify", run)),
        (
            "evaluating",
            (
                *("evaluate", run, "--output", str(output / "metrics.json")),
                *("--judge", judges[0], "--judge", judges[1], "--features", features or str(third / "judge_rgb")),
            ),
        ),
        ("counting nuclei", ("cellularity", run, "--output", str(output / "cellularity.json"))),
        ("report", ("report", run)),
    )


def _features(config) -> str | None:
    """The built-in nuclei network, where it can look at the patches: it needs no training, and it sees blur and blends,
    for which small classifiers of few patches are often blind."""
    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.metrics.nuclei import NAME, extractor_for

    return NAME if extractor_for(load_patches(config.data, seed=config.seed)) else None


def _require_ends(config) -> None:
    """UserError, before anything is trained, where it is not clear from which class to which is translated."""
    from cellflux_bridge.config.schema import nearest
    from cellflux_bridge.data.index import patch_index

    classes = patch_index(config.data, seed=config.seed).classes
    for key in ("source", "target"):
        label = getattr(config.translate, key)
        if label not in (classes if len(classes) > 2 else (*classes, None)):
            found = "not named" if label is None else f"no class {label!r} here{nearest(label, classes)}"
            raise UserError(f"translate.{key}: {found}; expected one of {', '.join(classes)}")
    source, target = config.translate.source, config.translate.target
    if (source is None) != (target is None) or (source is not None and source == target):
        raise UserError(
            f"translate.source={source}, translate.target={target}: name two classes, or, of two, neither; they are "
            + ", ".join(classes)
        )
    if config.translate.guidance.form in ("score", "bridge", "sharpen"):
        raise UserError(
            f"translate.guidance.form={config.translate.guidance.form}: asks a guide of states, which run does not "
            "train; call its commands one after the other, with train-classifier ... classifier.sees=state"
        )


def run(args: argparse.Namespace) -> None:
    """run CONFIG: all of it: train, translate, film, judge, count nuclei, report; a stopped run goes on.

    Every step is a command of its own, with the same result; in one process torch is loaded once.
    """
    config = configuration(args.config, args.overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.train.devices != 1 or config.train.num_nodes != 1:
        raise UserError(
            "run: works in one process on one device (train.devices=1). For several devices call its commands one "
            "after the other: " + ", ".join(dict.fromkeys(line[0] for _, line in stages("", (), Path("run"))))
        )
    _require_ends(config)
    if config.pairs.match_batch:
        steps = perturbation_stages(args.config, args.overrides, config.output)
    else:
        # What a dry run prints does not decode all patches first.
        features = None if args.dry_run else _features(config)
        steps = stages(args.config, args.overrides, config.output, seed=config.classifier.seed, features=features)
    if args.dry_run:
        print("\n".join(f"[{number} of {len(steps)}] {title}" for number, (title, _) in enumerate(steps, start=1)))
        if not config.pairs.match_batch:
            print("The third classifier is left out where the built-in nuclei network finds nuclei.")
        return
    began = time.monotonic()
    for number, (title, line) in enumerate(steps, start=1):
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        print(f"\n[{number} of {len(steps)}, after {minutes}:{seconds:02}] {title}", flush=True)
        _, function, parsed = parse(line)
        function(parsed)

"""The console command: `cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cellflux_bridge.errors import UserError


def _config(where: str, overrides: Sequence[str]):
    """The configuration of a YAML file, a run folder or a trajectory folder."""
    from cellflux_bridge.config import load_config

    path = Path(where)
    moved_to = path if (path / "checkpoints").is_dir() else None
    return load_config(path / "config.yaml" if path.is_dir() else path, overrides, output=moved_to)


def _start(config, train):
    """The processes of a training, its configuration with the classes that the patches turned out to have, and them."""
    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.training.loop import make_fabric, on_rank_zero

    fabric = make_fabric(train)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    on_rank_zero(fabric, lambda: load_patches(config.data, seed=config.seed))  # fills the cache for all
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return fabric, config.model_copy(update={"data": data}), patches


def _value(values: dict, key: str):
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            raise UserError(f"--key {key}: no such key; `config show` without --key prints all")
        values = values[part]
    return values


def _trajectory(where: str) -> Path:
    """A trajectory folder, or the newest one of a run folder."""
    folder = Path(where)
    if (folder / "trajectory.json").exists() or not (folder / "checkpoints").is_dir():
        return folder
    found = sorted((folder / "trajectories").glob("*/manifest.csv"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder}: holds no sequences yet; make them with: cellflux-bridge translate {folder}")
    return found[-1].parent


def config_command(args: argparse.Namespace) -> None:
    """config show CONFIG_OR_RUN: print the complete configuration, defaults and overrides filled in."""
    config = _config(args.config, args.overrides)
    if args.key is None:
        print(config.to_yaml(), end="")
    else:
        print(_value(config.model_dump(mode="json"), args.key))


def data_command(args: argparse.Namespace) -> None:
    """data check CONFIG: count, measure and look through the patches, and decode them into the cache."""
    from cellflux_bridge.data.check import check_data
    from cellflux_bridge.data.patches import load_patches

    config = _config(args.config, args.overrides)
    sheet = args.output or config.output / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    report, usable = check_data(config.data, seed=config.seed, sheet=sheet)
    print(report)
    if not usable:
        raise UserError("some files cannot be used (listed above): mend or remove them")
    load_patches(config.data, seed=config.seed)
    print("the cache is filled: training can start")


def train_command(args: argparse.Namespace) -> None:
    """train CONFIG_OR_RUN: train the flow, or go on where its run was stopped."""
    from cellflux_bridge.training.flow import FlowTask, build_flow
    from cellflux_bridge.training.loop import fit, on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, record_splits, require_free

    config = _config(args.config, args.overrides)
    if config.data.classes is not None:
        build_flow(config)  # what cannot fit is said before anything is decoded
    fabric, config, patches = _start(config, config.train)
    task = FlowTask(config, patches)

    def prepare() -> None:
        require_free(config.output, config, ignore=("classifier",), resume=config.train.resume)
        record_splits(config.output, patches)
        claim(config.output, config)

    on_rank_zero(fabric, prepare)
    newest = fit(task, config, config.train, folder=config.output, fabric=fabric)
    figures = last_values(config.output, "val/")
    fabric.print(f"trained: {newest}\n" + "\n".join(f"  {name:<24} {value:.4g}" for name, value in figures.items()))


def train_classifier_command(args: argparse.Namespace) -> None:
    """train-classifier CONFIG_OR_RUN: train a classifier of the patches, to judge translated ones with."""
    from cellflux_bridge.training import checkpoint, classifier
    from cellflux_bridge.training.loop import fit, on_rank_zero
    from cellflux_bridge.training.run import Log, claim, require_free

    config = _config(args.config, args.overrides)
    train = config.classifier.train
    folder = config.output / f"classifier_{config.classifier.view}"
    fabric, config, patches = _start(config, train)
    task = classifier.ClassifierTask(config, patches)
    unused = ("train", "coupling", "path", "velocity", "condition", "pairs")

    def prepare() -> None:
        require_free(folder, config, ignore=unused, resume=train.resume)
        claim(folder, config)

    on_rank_zero(fabric, prepare)
    newest = fit(task, config, train, folder=folder, fabric=fabric)
    if fabric.is_global_zero:
        scores = classifier.test_scores(classifier.load(newest, fabric.device), patches, device=fabric.device)
        step = checkpoint.step_of(newest)
        Log(folder, from_step=step, tensorboard=False).write(step, scores)
        print(f"trained: {newest}\n" + "\n".join(f"  {name:<38} {value:.4g}" for name, value in scores.items()))


def translate_command(args: argparse.Namespace) -> None:
    """translate RUN: carry held-out patches of one class to another and write the sequences."""
    from cellflux_bridge.api import Bridge

    bridge = Bridge.load(args.config, args.overrides)
    folder, figures = bridge.translate_split(
        source=args.source, target=args.target, output=args.output, overwrite=args.overwrite
    )
    made = figures["made_now"]
    pace = f", {figures['seconds'] / made:.3f} s each" if made else ""
    bridge.fabric.print(f"sequences: {folder} ({figures['sequences']}, {made} made now{pace})")


def classify_command(args: argparse.Namespace) -> None:
    """classify TRAJECTORY_OR_RUN: how many frames classifiers call the target class, beside a mere recolouring."""
    import json
    from dataclasses import asdict
    from functools import partial

    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.files import replace_text
    from cellflux_bridge.metrics.flip import flip_rate
    from cellflux_bridge.training import checkpoint, classifier
    from cellflux_bridge.training.loop import make_fabric
    from cellflux_bridge.trajectory import iter_trajectory, read_header

    folder = _trajectory(args.config)
    header = read_header(folder)
    classifiers = args.classifier or sorted(map(str, Path(args.config).glob("classifier_*")))
    if not classifiers:
        raise UserError(
            "--classifier: none given, and the run has none; train one with: cellflux-bridge train-classifier"
        )
    results = []
    for run in classifiers:
        newest = checkpoint.latest(Path(run))
        config = _config(str(newest), args.overrides)
        fabric = make_fabric(config.classifier.train)
        patches = load_patches(config.data, seed=config.seed)
        model = classifier.load(newest, fabric.device)
        targets = patches.sample("train", header.target, num=classifier.MOST_FOR_STATISTICS, seed=config.seed)
        real = patches.centre(targets).permute(0, 2, 3, 1).numpy()
        rate = flip_rate(
            iter_trajectory(folder),
            partial(classifier.predict, model, device=fabric.device),
            classes=patches.classes,
            real_targets=real,
        )
        scores = classifier.test_scores(model, patches, device=fabric.device)
        results.append({"classifier": str(newest), "view": config.classifier.view, **scores, **asdict(rate)})
        view, accuracy, num = config.classifier.view, scores["test/accuracy"], scores["test/n"]
        print(f"{run}: {view}, accuracy {accuracy:.3f} on {num} real patches")
        print(f"  fraction called {header.target} of {rate.num_sequences} sequences")
        print(f"    untranslated {header.source:<18} {rate.fraction[0]:.3f}")
        print(f"    Reinhard colour transfer       {rate.reinhard:.3f}")
        print(f"    translated (level 1)           {rate.fraction[-1]:.3f}")
        levels = "  ".join(f"{level:.2f}:{p:.2f}" for level, p in zip(rate.levels, rate.probability, strict=True))
        print(f"    mean probability by level      {levels}")
    replace_text(folder / "classification.json", json.dumps({**asdict(header), "judges": results}, indent=1) + "\n")
    print(f"wrote: {folder / 'classification.json'}")


def video_command(args: argparse.Namespace) -> None:
    """video TRAJECTORY_OR_RUN: write mp4, WebP, GIF or strip of the sequences."""
    from pydantic import ValidationError

    from cellflux_bridge.config import VideoConfig, parse_overrides
    from cellflux_bridge.schema import explain
    from cellflux_bridge.trajectory import load_trajectory
    from cellflux_bridge.video import write_all

    folder = _trajectory(args.config)
    if (folder / "config.yaml").exists():
        settings = _config(str(folder), args.overrides).video
    else:
        try:  # frames of the user's own, which no configuration made
            settings = VideoConfig.model_validate(parse_overrides(args.overrides).get("video", {}))
        except ValidationError as error:
            raise UserError(explain(error, VideoConfig, prefix="video")) from error
    trajectory = load_trajectory(folder, num=settings.sequences)
    for path in write_all(trajectory, args.output or folder, settings):
        print(f"wrote: {path}")


_OUTPUT = ("--output", {"type": Path, "help": "folder to write to instead of the default"})
_SHEET = ("--output", {"type": Path, "help": "PNG file for the contact sheet instead of the default"})
# command -> (function, what its positional argument is, flags, fixed second word)
_COMMANDS: dict[str, tuple[Callable, str, list, str | None]] = {
    "data": (data_command, "CONFIG", [_SHEET], "check"),
    "config": (config_command, "CONFIG_OR_RUN", [("--key", {"help": "print the value of one key only"})], "show"),
    "train": (train_command, "CONFIG_OR_RUN", [], None),
    "train-classifier": (train_classifier_command, "CONFIG_OR_RUN", [], None),
    "translate": (
        translate_command,
        "RUN",
        [
            ("--source", {"help": "class of the images to carry"}),
            ("--target", {"help": "class to carry them to"}),
            _OUTPUT,
            ("--overwrite", {"action": "store_true", "help": "remove an earlier translation that differs"}),
        ],
        None,
    ),
    "classify": (
        classify_command,
        "TRAJECTORY_OR_RUN",
        [("--classifier", {"action": "append", "metavar": "RUN", "help": "may be repeated; default: the run's own"})],
        None,
    ),
    "video": (video_command, "TRAJECTORY_OR_RUN", [_OUTPUT], None),
}


# What a full disk, a missing right, or a file where a folder should be (or the reverse) answers.
_USERS_ERRNO = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
)
# Commands whose work several processes share; of the others one is enough.
_SHARED = (train_command, train_classifier_command, translate_command)


def _usage() -> str:
    lines = ["usage: cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]", "", "commands:"]
    lines += [f"  {function.__doc__.splitlines()[0]}" for function, *_ in _COMMANDS.values()]
    lines += [
        "",
        "key.sub=value overrides the YAML file, as in train.steps=2000; `cellflux-bridge config show CONFIG` prints",
        "every key. `cellflux-bridge COMMAND --help` tells a command's flags. For research only.",
    ]
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> tuple[Callable, argparse.Namespace]:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        from cellflux_bridge import __version__

        print(__version__)
        raise SystemExit(0)
    if argv[0] not in _COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; known: {', '.join(_COMMANDS)}")
    function, positional, flags, second = _COMMANDS[argv[0]]
    parser = argparse.ArgumentParser(prog=f"cellflux-bridge {argv[0]}", description=function.__doc__)
    if second is not None:
        parser.add_argument("action", choices=[second])
    parser.add_argument("config", metavar=positional)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    for flag, options in flags:
        parser.add_argument(flag, **options)
    return function, parser.parse_intermixed_args(argv[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with its message and status 1, a signal with 128 + its number."""
    try:
        function, args = _parse(sys.argv[1:] if argv is None else argv)
        if function in _SHARED or os.environ.get("RANK", "0") == "0":  # torchrun gives every process a rank
            function(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno not in _USERS_ERRNO:
            raise
        raise SystemExit(f"error: cannot write {error.filename or 'a file'}: {error.strerror}") from None
    except Exception as error:
        code = getattr(error, "code", None)  # training.loop.Stopped, without importing torch for it
        if type(error).__name__ != "Stopped":
            raise
        print(error, file=sys.stderr)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()

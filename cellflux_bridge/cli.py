"""The console command: `cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import errno
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cellflux_bridge.errors import UserError


def _config(where: str, overrides: Sequence[str]):
    """The configuration of a YAML file, a run folder or a trajectory folder."""
    from cellflux_bridge.config import load_config

    path = Path(where)
    return load_config(path / "config.yaml" if path.is_dir() else path, overrides)


def _resolved(where: str, overrides: Sequence[str]):
    """A configuration with its patches and with the classes that they turned out to have."""
    from cellflux_bridge.data.patches import load_patches

    config = _config(where, overrides)
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return config.model_copy(update={"data": data}), patches


def config_command(args: argparse.Namespace) -> None:
    """config show CONFIG_OR_RUN: print the complete configuration, defaults and overrides filled in."""
    print(_config(args.config, args.overrides).to_yaml(), end="")


def data_command(args: argparse.Namespace) -> None:
    """data check CONFIG: count, measure and look through the patches before training on them."""
    from cellflux_bridge.data.check import check_data

    config = _config(args.config, args.overrides)
    sheet = args.output or config.output / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    report, usable = check_data(config.data, seed=config.seed, sheet=sheet)
    print(report)
    if not usable:
        raise UserError("some files cannot be used (listed above): mend or remove them")


def train_command(args: argparse.Namespace) -> None:
    """train CONFIG_OR_RUN: train the flow, or go on where its run was stopped."""
    from cellflux_bridge.training.flow import FlowTask
    from cellflux_bridge.training.loop import fit, make_fabric
    from cellflux_bridge.training.run import claim, record_splits

    config, patches = _resolved(args.config, args.overrides)
    fabric = make_fabric(config.train)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    task = FlowTask(config, patches)
    if fabric.is_global_zero:
        claim(config.output, config, ignore=("classifier",), resume=config.train.resume)
        record_splits(config.output, patches)
    fabric.barrier()
    newest = fit(task, config, config.train, folder=config.output, fabric=fabric)
    fabric.print(f"trained: {newest}")


def train_classifier_command(args: argparse.Namespace) -> None:
    """train-classifier CONFIG_OR_RUN: train a classifier of the patches, to judge translated ones with."""
    from cellflux_bridge.training import classifier
    from cellflux_bridge.training.loop import fit, make_fabric
    from cellflux_bridge.training.run import Log, claim

    config, patches = _resolved(args.config, args.overrides)
    train = config.classifier.train
    folder = config.output / f"classifier_{config.classifier.view}"
    fabric = make_fabric(train)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    task = classifier.ClassifierTask(config, patches)
    if fabric.is_global_zero:
        unused = ("train", "coupling", "path", "velocity", "condition", "pairs")
        claim(folder, config, ignore=unused, resume=train.resume)
    fabric.barrier()
    newest = fit(task, config, train, folder=folder, fabric=fabric)
    if fabric.is_global_zero:
        scores = classifier.test_scores(classifier.load(newest, fabric.device), patches, device=fabric.device)
        Log(folder, from_step=train.steps, tensorboard=False).write(train.steps, scores)
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
    print(f"sequences: {folder} ({figures['sequences']}, {made} made now{pace})")


def classify_command(args: argparse.Namespace) -> None:
    """classify TRAJECTORY --classifier RUN: how many frames a classifier calls the target class, by level."""
    from functools import partial

    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.metrics.flip import flip_rate
    from cellflux_bridge.training import checkpoint, classifier
    from cellflux_bridge.training.loop import make_fabric
    from cellflux_bridge.trajectory import iter_trajectory, read_header

    header = read_header(Path(args.config))
    for run in args.classifier:
        newest = checkpoint.latest(Path(run))
        config = checkpoint.read_config(newest)
        fabric = make_fabric(config.classifier.train)
        patches = load_patches(config.data, seed=config.seed)
        model = classifier.load(newest, fabric.device)
        real = patches.centre(patches.indices("train", header.target)).permute(0, 2, 3, 1).numpy()
        rate = flip_rate(
            iter_trajectory(Path(args.config)),
            partial(classifier.predict, model, device=fabric.device),
            classes=patches.classes,
            real_targets=real,
        )
        scores = classifier.test_scores(model, patches, device=fabric.device)
        view, accuracy, num = config.classifier.view, scores["test/accuracy"], scores["test/n"]
        print(f"{run}: {view}, accuracy {accuracy:.3f} on {num} real patches")
        print(f"  fraction called {header.target} of {rate.num_sequences} sequences")
        print(f"    untranslated {header.source:<18} {rate.fraction[0]:.3f}")
        print(f"    Reinhard colour transfer       {rate.reinhard:.3f}")
        print(f"    translated (level 1)           {rate.fraction[-1]:.3f}")
        levels = "  ".join(f"{level:.2f}:{p:.2f}" for level, p in zip(rate.levels, rate.probability, strict=True))
        print(f"    mean probability by level      {levels}")


def video_command(args: argparse.Namespace) -> None:
    """video TRAJECTORY: write mp4, WebP, GIF or strip of the sequences."""
    from cellflux_bridge.config import VideoConfig, parse_overrides
    from cellflux_bridge.trajectory import load_trajectory
    from cellflux_bridge.video import write_all

    folder = Path(args.config)
    if (folder / "config.yaml").exists():
        settings = _config(args.config, args.overrides).video
    else:
        settings = VideoConfig(**parse_overrides(args.overrides).get("video", {}))
    trajectory = load_trajectory(folder, num=settings.sequences)
    for path in write_all(trajectory, args.output or folder, settings):
        print(f"wrote: {path}")


_OUTPUT = ("--output", {"type": Path, "help": "folder (or file) to write to instead of the default"})
# command -> (function, what its positional argument is, flags, fixed second word)
_COMMANDS: dict[str, tuple[Callable, str, list, str | None]] = {
    "data": (data_command, "CONFIG", [_OUTPUT], "check"),
    "config": (config_command, "CONFIG_OR_RUN", [], "show"),
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
        "TRAJECTORY",
        [("--classifier", {"action": "append", "required": True, "metavar": "RUN", "help": "may be repeated"})],
        None,
    ),
    "video": (video_command, "TRAJECTORY", [_OUTPUT], None),
}


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
        function(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
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

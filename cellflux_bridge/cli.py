"""The console command: `cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import argparse
import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError

# What a run folder holds: checkpoints of a flow or a classifier, or the reference bridge's two trainings.
_REFERENCE = ("denoiser", "noisy_classifier")


def _is_run(path: Path) -> bool:
    return any((path / part).is_dir() for part in ("checkpoints", *_REFERENCE))


def _config(where: str, overrides: Sequence[str]):
    """The configuration of a YAML file, a run folder or a trajectory folder."""
    from cellflux_bridge.config import load_config

    path = Path(where)
    moved_to = path if _is_run(path) else None
    return load_config(path / "config.yaml" if path.is_dir() else path, overrides, output=moved_to)


def _start(config, train, *, section):
    """The processes of a training, its configuration with the classes that the patches turned out to have, and them."""
    from cellflux_bridge.data.index import taken_from_training
    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.training.loop import make_fabric, on_rank_zero

    fabric = make_fabric(train, section=section)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)

    def fill_cache() -> None:
        taken = taken_from_training(config.data, seed=config.seed)
        if taken:
            print(taken)
        load_patches(config.data, seed=config.seed)

    on_rank_zero(fabric, fill_cache)
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return fabric, config.model_copy(update={"data": data}), patches


def _trajectory(where: str) -> Path:
    """A trajectory folder, or the newest one of a run folder."""
    folder = Path(where)
    if (folder / "trajectory.json").exists() or not _is_run(folder):
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
        print(config.value(args.key))


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
    from cellflux_bridge.flow.levels import target_levels
    from cellflux_bridge.flow.task import FlowTask, build_flow
    from cellflux_bridge.training.loop import fit, on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, record_splits, require_free

    config = _config(args.config, args.overrides)
    if config.data.classes is not None:
        build_flow(config)  # what cannot fit is said before anything is decoded
    fabric, config, patches = _start(config, config.train, section="train")
    by_level = config.condition.target == "level"
    crossfit = by_level and config.condition.level == "crossfit"

    def prepare() -> None:
        if any((config.output / part).is_dir() for part in _REFERENCE):
            raise UserError(f"{config.output}: holds a reference bridge's run; choose another output for the flow")
        unused = ("ddim",) if crossfit else ("ddim", "classifier")
        require_free(config.output, config, ignore=unused, resume=config.train.resume)
        record_splits(config.output, patches)
        claim(config.output, config)

    task = FlowTask(config, patches)  # refuses what cannot be trained before anything is written
    on_rank_zero(fabric, prepare)
    if by_level:
        levels = target_levels(config, patches, folder=config.output, fabric=fabric)
        fabric.seed_everything(config.seed, verbose=False)  # cross-fitting drew, where it was not done already
        task = FlowTask(config, patches, levels=levels)
    newest = fit(task, config, config.train, folder=config.output, fabric=fabric)
    figures = last_values(config.output, "val/")
    fabric.print(f"trained: {newest}\n" + "\n".join(f"  {name:<24} {value:.4g}" for name, value in figures.items()))


def train_classifier_command(args: argparse.Namespace) -> None:
    """train-classifier CONFIG_OR_RUN: train a judge of translated patches, or a guide (classifier.role=guide)."""
    from cellflux_bridge import checkpoint
    from cellflux_bridge.classifier import inference
    from cellflux_bridge.classifier import scores as classifier_scores
    from cellflux_bridge.classifier.task import ClassifierTask
    from cellflux_bridge.flow.levels import read_levels, target_levels
    from cellflux_bridge.training.loop import fit, on_rank_zero
    from cellflux_bridge.training.run import Log, claim, require_free, require_held_out

    config = _config(args.config, args.overrides)
    train = config.classifier.train
    of_states = config.classifier.sees == "state"
    folder = config.output / f"{config.classifier.role}_{config.classifier.view}{'_state' if of_states else ''}"
    fabric, config, patches = _start(config, train, section="classifier.train")
    unused = ("train", "velocity", "ddim") + (() if of_states else ("coupling", "path", "condition", "pairs"))

    def prepare() -> None:
        require_free(folder, config, ignore=unused, resume=train.resume)
        require_held_out(config.output, patches)
        claim(folder, config)

    levels, of_flow = None, config.output / "levels.csv"
    if of_states and config.condition.target == "level":
        if of_flow.exists():  # the very levels that the flow was trained with, whatever this classifier is
            levels = read_levels(of_flow, patches)
        else:
            levels = target_levels(config, patches, folder=config.output, fabric=fabric)
    task = ClassifierTask(config, patches, levels=levels)
    on_rank_zero(fabric, prepare)
    newest = fit(task, config, train, folder=folder, fabric=fabric)
    if fabric.is_global_zero:
        model = inference.load(newest, fabric.device)
        if of_states:
            scores = classifier_scores.state_scores(model, config, patches, device=fabric.device, levels=levels)
            if not scores["test/n"]:
                print("no figures of the test split: its patches have no level (a score, or a row in levels.csv)")
        else:
            labels = config.classifier.labels
            scores = classifier_scores.image_scores(model, patches, device=fabric.device, labels=labels)
        step = checkpoint.step_of(newest)
        Log(folder, from_step=step, tensorboard=False).write(step, scores)
        print(f"trained: {newest}\n" + "\n".join(f"  {name:<38} {value:.4g}" for name, value in scores.items()))


def train_ddim_command(args: argparse.Namespace) -> None:
    """train-ddim CONFIG_OR_RUN: train the reference bridge's denoiser, then its noisy classifier."""
    from cellflux_bridge.ddim.task import STAGES, refuse_unfit, used_stages
    from cellflux_bridge.training.loop import fit, on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, record_splits, require_free

    config = _config(args.config, args.overrides)
    refuse_unfit(config)
    fabric, config, patches = _start(config, config.ddim.denoiser.train, section="ddim.denoiser.train")
    tasks = {name: STAGES[name].task(config, patches) for name in used_stages(config)}

    def prepare() -> None:
        if (config.output / "checkpoints").exists():
            raise UserError(f"{config.output}: holds a flow's run; choose another output for the bridge")
        # Everything is asked for before anything is written.
        for name in tasks:
            stage = STAGES[name]
            require_free(config.output / name, config, ignore=stage.unused, resume=stage.settings(config).train.resume)
        record_splits(config.output, patches)
        for folder in (config.output, *(config.output / name for name in tasks)):
            claim(folder, config)

    on_rank_zero(fabric, prepare)
    for name, task in tasks.items():
        newest = fit(task, config, STAGES[name].settings(config).train, folder=config.output / name, fabric=fabric)
        if fabric.is_global_zero:
            figures = last_values(config.output / name, "val/")
            print(f"trained: {newest}\n" + "\n".join(f"  {key:<24} {value:.4g}" for key, value in figures.items()))


def translate_command(args: argparse.Namespace) -> None:
    """translate RUN: carry held-out patches of one class to another and write the sequences.

    A YAML file in the place of RUN names weights of a reference bridge that were trained elsewhere.
    """
    where = Path(args.config)
    if where.is_file():
        config = _config(args.config, args.overrides)
        # A file that names weights is a reference bridge itself; another one stands for the run that it made.
        where = where if config.ddim.denoiser.weights is not None else config.output
    if where.is_file() or any((where / part).is_dir() for part in _REFERENCE):
        from cellflux_bridge.translation.ddim import DDIMTranslator as Kind
    else:
        from cellflux_bridge.api import Bridge as Kind

    translator = Kind.load(where, args.overrides)
    folder, figures = translator.translate_split(
        source=args.source, target=args.target, output=args.output, overwrite=args.overwrite
    )
    made = figures["made_now"]
    pace = f", {figures['seconds'] / made:.3f} s each" if made else ""
    translator.fabric.print(f"sequences: {folder} ({figures['sequences']}, {made} made now{pace})")


def classify_command(args: argparse.Namespace) -> None:
    """classify TRAJECTORY_OR_RUN: how many frames classifiers call the target class, beside a mere recolouring."""
    import json
    from dataclasses import asdict

    from cellflux_bridge import checkpoint
    from cellflux_bridge.base.files import replace_text
    from cellflux_bridge.metrics.classify import classify
    from cellflux_bridge.training.loop import make_fabric
    from cellflux_bridge.trajectory import read_header

    folder = _trajectory(args.config)
    header = read_header(folder)
    runs = args.classifier or sorted(map(str, Path(args.config).glob("judge_*")))
    if not runs:
        raise UserError(
            "--classifier: none given, and the run has none; train one with: cellflux-bridge train-classifier"
        )
    judge = _config(str(checkpoint.latest(Path(runs[0]))), args.overrides)
    fabric = make_fabric(judge.classifier.train, section="classifier.train")
    found = classify(folder, [Path(run) for run in runs], overrides=args.overrides, device=fabric.device)
    results = []
    for run, one in zip(runs, found, strict=True):
        results.append(one.as_json())
        accuracy, num, rate = one.scores["test/accuracy"], one.scores["test/n"], one.rate
        print(f"{run}: {one.judge.view}, accuracy {accuracy:.3f} on {num} real patches")
        print(f"  fraction called {header.target} of {rate.num_sequences} sequences")
        print(f"    untranslated {header.source:<18} {rate.fraction[0]:.3f}")
        print(f"    Reinhard colour transfer       {rate.reinhard:.3f}")
        print(f"    translated (level 1)           {rate.fraction[-1]:.3f}")
        levels = "  ".join(f"{level:.2f}:{p:.2f}" for level, p in zip(rate.levels, rate.probability, strict=True))
        print(f"    mean probability by level      {levels}")
    replace_text(folder / "classification.json", json.dumps({**asdict(header), "judges": results}, indent=1) + "\n")
    print(f"wrote: {folder / 'classification.json'}")


def evaluate_command(args: argparse.Namespace) -> None:
    """evaluate TRAJECTORY_OR_RUN ...: fidelity, calibration, preservation and cost of methods side by side."""
    from cellflux_bridge import checkpoint
    from cellflux_bridge.base.files import require_json
    from cellflux_bridge.config import split_overrides
    from cellflux_bridge.metrics.evaluate import evaluate
    from cellflux_bridge.metrics.results import write_results
    from cellflux_bridge.training.loop import make_fabric

    paths, overrides = split_overrides(args.overrides)
    folders = [_trajectory(text) for text in (args.config, *paths)]
    for flag, given in (("--judge", args.judge), ("--features", args.features)):
        if not given:
            raise UserError(f"{flag}: none given; name the run of a classifier (cellflux-bridge train-classifier)")
    output = args.output or folders[0] / "metrics.json"
    require_json(output)
    judge = _config(str(checkpoint.latest(args.judge[0])), overrides)
    fabric = make_fabric(judge.classifier.train, section="classifier.train")
    evaluation = evaluate(
        folders,
        judges=args.judge,
        features=args.features,
        scores=args.scores,
        cycle=None if args.cycle is None else _trajectory(args.cycle),
        unguided=[_trajectory(text) for text in args.unguided],
        num_levels=args.levels,
        max_real=args.max_real,
        overrides=overrides,
        device=fabric.device,
        cache=output.with_suffix(".cache"),
    )
    files, table = write_results(evaluation, output)
    print(table)
    for path in files:
        print(f"wrote: {path}")


def cellularity_command(args: argparse.Namespace) -> None:
    """cellularity TRAJECTORY_OR_RUN ...: count nuclei along the levels, beside real patches of both classes.

    With --images, --annotated or --label-maps: of a folder's images, against annotated cellularity, or label maps.
    """
    from cellflux_bridge.cellularity.nuclei import Parameters

    if args.mpp is not None and not 0 < args.mpp < math.inf:
        raise UserError(f"--mpp {args.mpp}: expected microns per pixel, above 0")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected a number of processes, or 0 for one a core")
    other = {"--images": args.images, "--annotated": args.annotated, "--label-maps": args.label_maps}
    asked = [flag for flag, given in other.items() if given is not None]
    if len(asked) + (args.config is not None) != 1:
        raise UserError(f"expected trajectories or one of {', '.join(other)}; given: {', '.join(asked) or 'nothing'}")
    if args.instanseg is not None and not args.instanseg.is_file():
        raise UserError(
            f"--instanseg {args.instanseg}: no such file; expected InstanSeg's TorchScript file, instanseg.pt"
        )
    if args.instanseg is not None and args.stains != "red":
        raise UserError(f"--stains {args.stains}: --instanseg finds nuclei without stains; leave one out")
    parameters = Parameters(stains=args.stains, instanseg=str(args.instanseg or ""))
    if args.config is None:
        for flag, given in (("--real-source", args.real_source), ("--real-target", args.real_target)):
            if given is not None:
                raise UserError(f"{flag}: goes with trajectories, not with {asked[0]}")
        if args.output is not None and args.images is None:
            raise UserError(f"--output: {asked[0]} prints its figures and writes nothing")
        _cellularity_of_images(args, parameters)
        return
    from cellflux_bridge.base.files import require_json
    from cellflux_bridge.cellularity.along import along_trajectories
    from cellflux_bridge.cellularity.export import summary, write_results
    from cellflux_bridge.config import split_overrides

    paths, overrides = split_overrides(args.overrides)
    folders = [_trajectory(text) for text in (args.config, *paths)]
    output = args.output or folders[0] / "cellularity.json"
    require_json(output)
    if (args.real_source is None) != (args.real_target is None):
        raise UserError("--real-source and --real-target: give both folders, or neither")
    patches = None
    if args.real_source is None and (folders[0] / "config.yaml").exists():
        from cellflux_bridge.data.patches import load_patches

        config = _config(str(folders[0]), overrides)
        patches = load_patches(config.data, seed=config.seed)
    elif overrides:
        raise UserError(f"{overrides[0]}: the trajectory has no configuration to override, or real folders are given")
    content = along_trajectories(
        folders,
        patches=patches,
        real_folders=None if args.real_source is None else (args.real_source, args.real_target),
        mpp=args.mpp,
        parameters=parameters,
        workers=args.workers,
    )
    files = write_results(content, output)
    print(summary(content))
    for path in files:
        print(f"wrote: {path}")


def _cellularity_of_images(args: argparse.Namespace, parameters) -> None:
    from cellflux_bridge.cellularity import counting, validation

    if args.images is not None:
        output = args.output or args.images.with_name(f"{args.images.name}_nuclei.csv")
        tally = counting.write_counts(args.images, output, mpp=args.mpp, parameters=parameters, workers=args.workers)
        if tally.too_small:
            print(f"{tally.too_small} images: nuclei under {counting.MIN_PIXELS:g} px, counts are left out")
        if tally.unmeasured:
            print(f"{tally.unmeasured} images: could not be measured; the column reason says why")
        print(f"wrote: {output}")
    elif args.annotated is not None:
        found = validation.agree(args.annotated, mpp=args.mpp, parameters=parameters, workers=args.workers)
        print(f"{args.annotated}: {found.n} images")
        for name, one in zip(found._fields[1:], found[1:], strict=True):
            print(f"  {name:<20} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]")
    else:
        _, groups, compared = validation.score_label_maps(
            args.label_maps, mpp=args.mpp, parameters=parameters, workers=args.workers
        )
        for group in ["all", *(sorted(set(groups)) if len(set(groups)) > 1 else [])]:
            chosen = [one for one, of in zip(compared, groups, strict=True) if group in ("all", of)]
            values = validation.score(chosen)._asdict().items()
            shown = (f"{name} {'undefined' if math.isnan(value) else f'{value:.4g}'}" for name, value in values)
            print(f"{group}: " + "  ".join(shown))


def video_command(args: argparse.Namespace) -> None:
    """video TRAJECTORY_OR_RUN: write mp4, WebP, GIF or strip of the sequences."""
    from pydantic import ValidationError

    from cellflux_bridge.config import parse_overrides
    from cellflux_bridge.config.schema import explain
    from cellflux_bridge.trajectory import load_trajectory
    from cellflux_bridge.video.encode import write_all
    from cellflux_bridge.video.settings import VideoConfig

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


def export_command(args: argparse.Namespace) -> None:
    """export TRAJECTORY_OR_RUN: copy the sequences into the folders and arrays of Cellflow's release."""
    from cellflux_bridge.trajectory import export_cellflow

    folder = _trajectory(args.config)
    print(f"wrote: {export_cellflow(folder, args.output or folder / 'cellflow')}")


def report_command(args: argparse.Namespace) -> None:
    """report RUN ...: one HTML file about runs that were evaluated, and figures for a paper beside it."""
    from cellflux_bridge.report.page import write_report

    runs = [Path(text) for text in (args.config, *args.overrides)]
    page, figures = write_report(runs, args.output or runs[0] / "report.html", num_sequences=args.sequences)
    for path in figures:
        print(f"wrote: {path}")
    print(f"open in a browser: {page.resolve()}")


_TRUST = (
    "--trust",
    {"action": "store_true", "help": "import the modules that a run or trajectory names (package.module:Class)"},
)
_OUTPUT = ("--output", {"type": Path, "help": "folder to write to instead of the default"})
_SHEET = ("--output", {"type": Path, "help": "PNG file for the contact sheet instead of the default"})
# command -> (function, what its positional argument is, flags, fixed second word)
_COMMANDS: dict[str, tuple[Callable, str, list, str | None]] = {
    "data": (data_command, "CONFIG", [_SHEET], "check"),
    "config": (config_command, "CONFIG_OR_RUN", [("--key", {"help": "print the value of one key only"})], "show"),
    "train": (train_command, "CONFIG_OR_RUN", [], None),
    "train-classifier": (train_classifier_command, "CONFIG_OR_RUN", [], None),
    "train-ddim": (train_ddim_command, "CONFIG_OR_RUN", [], None),
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
    "evaluate": (
        evaluate_command,
        "TRAJECTORY_OR_RUN",
        [
            (
                "--judge",
                {"action": "append", "type": Path, "metavar": "RUN", "help": "classifier that judges; may be repeated"},
            ),
            (
                "--features",
                {"metavar": "RUN", "help": "classifier that neither guided nor judges, or timm:, hf-hub:, local-dir:"},
            ),
            ("--scores", {"type": Path, "metavar": "RUN", "help": "classifier of severity (classifier.labels=score)"}),
            (
                "--unguided",
                {"action": "append", "default": [], "metavar": "TRAJECTORY", "help": "the same method unguided"},
            ),
            ("--cycle", {"metavar": "TRAJECTORY", "help": "carries the last frames of one of these back again"}),
            ("--levels", {"type": int, "default": 10, "help": "levels at which methods are compared (10)"}),
            (
                "--max-real",
                {"type": int, "default": 10_000, "help": "real patches of a class to compare to, at most (10,000)"},
            ),
            ("--output", {"type": Path, "help": "metrics.json to write, .csv and .md beside it"}),
        ],
        None,
    ),
    "cellularity": (
        cellularity_command,
        "TRAJECTORY_OR_RUN",
        [
            ("--output", {"type": Path, "help": "cellularity.json to write, .csv beside it; a CSV with --images"}),
            ("--real-source", {"type": Path, "metavar": "FOLDER", "help": "real source patches, of the frames' scale"}),
            ("--real-target", {"type": Path, "metavar": "FOLDER", "help": "real target patches, of the frames' scale"}),
            ("--images", {"type": Path, "metavar": "FOLDER", "help": "count in a folder's images instead"}),
            ("--annotated", {"type": Path, "metavar": "CSV", "help": "columns path, cellularity: how well they agree"}),
            ("--label-maps", {"type": Path, "metavar": "FOLDER", "help": "images/ and labels/: how well nuclei match"}),
            ("--mpp", {"type": float, "help": "microns per pixel of what is counted (default: a trajectory's own)"}),
            (
                "--instanseg",
                {"type": Path, "metavar": "FILE", "help": "let InstanSeg's TorchScript file find the nuclei"},
            ),
            ("--stains", {"default": "red", "help": "red (the red channel's absorption), ruifrok or macenko"}),
            ("--workers", {"type": int, "default": 0, "help": "processes (0: one a core)"}),
        ],
        None,
    ),
    "video": (video_command, "TRAJECTORY_OR_RUN", [_OUTPUT], None),
    "export": (export_command, "TRAJECTORY_OR_RUN", [_OUTPUT], None),
    "report": (
        report_command,
        "RUN",
        [
            (
                "--output",
                {"type": Path, "help": "HTML file (default: report.html in the first run), figures/ beside it"},
            ),
            ("--sequences", {"type": int, "default": 50, "help": "sources to show of each transition, at most (50)"}),
        ],
        None,
    ),
}


# What a full disk, a missing right, or a file where a folder should be (or the reverse) answers.
_USERS_ERRNO = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
)
# Commands whose work several processes share; of the others one is enough.
_SHARED = (train_command, train_classifier_command, train_ddim_command, translate_command)


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
    optional = {"nargs": "?"} if function is cellularity_command else {}
    parser.add_argument("config", metavar=positional, **optional)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    for flag, options in (*flags, _TRUST):
        parser.add_argument(flag, **options)
    return function, parser.parse_intermixed_args(argv[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends with its message and status 1, a signal with 128 + its number."""
    try:
        function, args = _parse(sys.argv[1:] if argv is None else argv)
        if function in _SHARED or os.environ.get("RANK", "0") == "0":  # torchrun gives every process a rank
            from cellflux_bridge.config.registry import trusting

            with trusting(args.trust):
                function(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno not in _USERS_ERRNO:
            raise
        raise SystemExit(f"error: cannot access {error.filename or 'a file'}: {error.strerror}") from None
    except Exception as error:
        code = getattr(error, "code", None)  # training.loop.Stopped, without importing torch for it
        if type(error).__name__ != "Stopped":
            raise
        print(error, file=sys.stderr)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()

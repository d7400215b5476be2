"""The table of commands: what each takes. A command is a module of this folder with a function `run(args)`."""

import argparse
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cellflux_bridge.base.errors import UserError

Flag = tuple[str, dict[str, Any]]


class Command(NamedTuple):
    """A command's positional arguments, its flags, the fixed word after its name, and whether several processes share
    its work (of any other command one process is enough). `optional`: the first positional argument may be missing."""

    positional: str
    flags: tuple[Flag, ...] = ()
    word: str | None = None
    shared: bool = False
    optional: bool = False


def _flag(name: str, help: str, **options: Any) -> Flag:
    return name, {"help": help, **options}


def _path(name: str, help: str, **options: Any) -> Flag:
    return _flag(name, help, type=Path, **options)


_TRUST = _flag("--trust", "run code, and make caches and phantoms, as a run or trajectory says", action="store_true")
_FOLDER = _path("--output", "folder to write to (default: in the run)")
COMMANDS = {
    "data": Command(
        "CONFIG", (_path("--output", "PNG file of the contact sheet (default: in the run)"),), word="check"
    ),
    "data prepare": Command(
        "NAME SRC OUT",
        (
            _flag("--list", "name the data sets that are known", action="store_true"),
            _path("--table", "groups or labels that a data set lacks; its entry says which columns", metavar="CSV"),
            _flag("--allow-other-counts", "accept other numbers of images than were published", action="store_true"),
            _flag("--published-split", "keep a published split that divides groups", action="store_true"),
        ),
        optional=True,
    ),
    "config": Command("CONFIG_OR_RUN", (_flag("--key", "print one key or section only"),), word="show"),
    "run": Command("CONFIG", (_flag("--dry-run", "check the settings and print the steps", action="store_true"),)),
    "train": Command("CONFIG_OR_RUN", shared=True),
    "train-classifier": Command("CONFIG_OR_RUN", shared=True),
    "train-ddim": Command("CONFIG_OR_RUN", shared=True),
    "train-nuclei": Command("CONFIG_OR_RUN", shared=True),
    "translate": Command(
        "RUN",
        (
            _flag("--source", "class of the patches to translate"),
            _flag("--target", "class to translate them to"),
            _path("--images", "translate a folder's images, or one file, instead of held-out patches"),
            _FOLDER,
            _flag("--overwrite", "remove an earlier translation that was made otherwise", action="store_true"),
        ),
        shared=True,
    ),
    "classify": Command(
        "TRAJECTORY_OR_RUN",
        (_flag("--classifier", "a judge; may be repeated (default: the run's own)", action="append", metavar="RUN"),),
    ),
    "evaluate": Command(
        "TRAJECTORY_OR_RUN",
        (
            _path("--judge", "run of a classifier that judges; may be repeated", action="append", metavar="RUN"),
            _flag(
                "--features",
                "run of a third classifier, or nuclei (built-in, H&E), timm:, hf-hub:, local-dir:",
                metavar="RUN",
            ),
            _path("--scores", "run of a classifier that estimates severity (classifier.labels=score)", metavar="RUN"),
            _flag("--unguided", "the same method without guidance", action="append", default=[], metavar="TRAJECTORY"),
            _flag("--cycle", "sequences that carry the last frames of one of these back", metavar="TRAJECTORY"),
            _flag("--levels", "number of levels at which methods are compared (10, or all of fewer)", type=int),
            _flag("--max-real", "use at most so many real patches of a class (10,000)", type=int, default=10_000),
            _path("--output", "JSON file to write (default: in the first trajectory); .csv and .md go beside it"),
        ),
    ),
    "perturbations": Command(
        "RUN",
        (
            _path("--beside", "another run on the same cells; may be repeated", action="append", metavar="RUN"),
            _flag("--features", "a judge's run, timm:, hf-hub: or local-dir:; may be repeated", action="append"),
            _path(
                "--moa",
                "columns name, moa: modes of action (default: moa.csv in data.root, if there is one)",
                metavar="CSV",
            ),
            _flag("--dna", "number of the nuclear channel (0)", type=int, default=0),
            _flag("--num", "use at most so many cells of each perturbation", type=int),
            _flag("--split", "whose cells (test)", default="test", choices=("train", "val", "test")),
            _path("--output", "folder to write to (default: RUN/perturbations)"),
        ),
    ),
    "cellularity": Command(
        "TRAJECTORY_OR_RUN",
        (
            _path("--output", "cellularity.json to write, .csv beside it; a CSV with --images"),
            _path("--real-source", "real source patches, of the frames' scale", metavar="FOLDER"),
            _path("--real-target", "real target patches, of the frames' scale", metavar="FOLDER"),
            _path("--images", "count in a folder's images instead", metavar="FOLDER"),
            _path(
                "--nuclei", "with --images: CSV and GeoJSON (QuPath) of single nuclei, into a folder", metavar="FOLDER"
            ),
            _path("--annotated", "columns path, cellularity: how well they agree", metavar="CSV"),
            _path("--label-maps", "images/ and labels/: how well nuclei match", metavar="FOLDER"),
            _flag("--diameter", "with --label-maps: first bring nuclei to so many px across", type=float),
            _flag("--mpp", "microns per pixel of what is counted (default: a trajectory's own)", type=float),
            _flag("--method", "network (built-in, or --model), or classical: rules of colour", default="network"),
            _path("--model", "a nuclei network that train-nuclei made, instead of the built-in one", metavar="RUN"),
            _flag("--device", "where the network runs: cpu, cuda", default="cpu"),
            _path("--instanseg", "let InstanSeg's TorchScript file find the nuclei", metavar="FILE"),
            _flag("--stains", "with --method classical: red, ruifrok or macenko", default="red"),
            _flag("--workers", "processes (0: one a core)", type=int, default=0),
        ),
        optional=True,
    ),
    "benchmark": Command(
        "CONFIG",
        (
            _flag("--variant", 'a recipe: "name: key=value key=value"; may be repeated', action="append"),
            _flag("--updates", "numbers of updates (500)", type=int, nargs="+", default=[500]),
            _flag("--seeds", "train with so many seeds (1)", type=int, default=1),
            _flag("--sources", "compare so many test patches of each class (200)", type=int, default=200),
            _path("--output", "folder of the runs and quality.csv (default: runs/benchmark_quality)"),
        ),
        word="quality",
    ),
    "study": Command(
        "STUDY",
        (
            _flag("--dry-run", "print what would be done, and its cost", action="store_true"),
            _flag("--workers", "processes on this machine (0: one a core, 1 beside a GPU)", type=int, default=0),
            _flag("--slurm", "jobs of a SLURM array, with submitit's parameters", nargs="*", metavar="KEY=VALUE"),
        ),
    ),
    "video": Command("TRAJECTORY_OR_RUN", (_FOLDER,)),
    "export": Command("TRAJECTORY_OR_RUN", (_FOLDER,)),
    "report": Command(
        "RUN",
        (
            _path("--output", "HTML file to write; figures/ goes beside it (default: report.html in the first run)"),
            _flag("--sequences", "show at most so many sources of each transition (50)", type=int, default=50),
        ),
    ),
}


def _function(name: str) -> Callable[[argparse.Namespace], None]:
    module, _, word = name.partition(" ")
    return getattr(import_module(f"cellflux_bridge.cli.{module.replace('-', '_')}"), word or "run")


def usage() -> str:
    """The help of `cellflux-bridge` itself: the first line of every command's docstring."""
    lines = ["usage: cellflux-bridge COMMAND CONFIG_OR_RUN [key.sub=value ...]", "", "commands:"]
    lines += [f"  {_function(name).__doc__.splitlines()[0]}" for name in COMMANDS]
    lines += [
        "",
        "key.sub=value replaces a setting of the YAML file, as in train.steps=2000.",
        "`cellflux-bridge config show CONFIG` prints every key; comments in configs/*.yaml say what they mean.",
        "`cellflux-bridge COMMAND --help` explains the flags of a command. For research only.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[Command, Callable[[argparse.Namespace], None], argparse.Namespace]:
    """The command that a command line means, its function and the arguments for it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        from cellflux_bridge import __version__

        print(__version__)
        raise SystemExit(0)
    from cellflux_bridge.config.schema import nearest

    name, rest = argv[0], argv[1:]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        known = dict.fromkeys(command.split()[0] for command in COMMANDS)
        raise UserError(f"unknown command {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    if dashed := [text for text in argv if re.match(r"--?[A-Za-z_]\w*\.[\w.]+(=|$)", text)]:
        raise UserError(f"{dashed[0]}: settings are written without dashes, as in {dashed[0].lstrip('-')}")
    command, function = COMMANDS[name], _function(name)
    parser = argparse.ArgumentParser(prog=f"cellflux-bridge {name}", description=function.__doc__)
    if command.word is not None:
        others = [other.split()[1] for other in COMMANDS if other.startswith(f"{name} ")]
        parser.add_argument("action", choices=[command.word, *others])
    first, *more = command.positional.split()
    parser.add_argument("config", metavar=first, **({"nargs": "?"} if command.optional else {}))
    overrides = {"metavar": "key.sub=value", "help": "settings that replace those of the file"}
    parser.add_argument("overrides", nargs="*", **({"metavar": " ".join(more)} if more else overrides))
    for flag, options in (*command.flags, _TRUST):
        parser.add_argument(flag, **options)
    args = parser.parse_intermixed_args(rest)
    if command.word is not None and args.action != command.word:
        parser.error(f"write {name} {args.action} before its flags")
    return command, function, args

"""Where runs and trajectories are, and the processes that a training starts with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import run_of

# What the run folder of a reference bridge holds: its two trainings.
DDIM_PARTS = ("denoiser", "noisy_classifier")


def holds_ddim(folder: Path) -> bool:
    """Whether a folder is a run of the reference bridge."""
    return any((folder / part).is_dir() for part in DDIM_PARTS)


def is_run(folder: Path) -> bool:
    """Whether a folder is the run of a flow, a classifier or the reference bridge (which may hold sequences alone)."""
    return any((folder / part).is_dir() for part in ("checkpoints", "trajectories")) or holds_ddim(folder)


def configuration(where: Path | str, overrides: Sequence[str]):
    """The configuration of a YAML file, or of the folder of a run, a checkpoint or a trajectory, whose output is where
    that folder is, whatever it says: it may have moved, or come from somebody else."""
    from cellflux_bridge.config import load_config

    path = Path(where)
    file, output = (path / "config.yaml", run_of(path)) if path.is_dir() else (path, None)
    return load_config(file, overrides, output=output)


def trajectory_folder(where: Path | str) -> Path:
    """A trajectory folder, or the newest one of a run folder."""
    folder = Path(where)
    if (folder / "trajectory.json").exists() or not is_run(folder):
        return folder
    found = sorted((folder / "trajectories").glob("*/manifest.csv"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder}: holds no sequences yet; make them with: cellflux-bridge translate {folder}")
    if len(found) > 1:
        others = ", ".join(path.parent.name for path in found[:-1])
        print(
            f"using the newest translation, {found[-1].parent}; to choose another ({others}), name its folder instead"
        )
    return found[-1].parent


def trajectories_and_overrides(args) -> tuple[list[Path], list[str]]:
    """The trajectory folders that a command line names, and its `key.sub=value` settings."""
    from cellflux_bridge.config import split_overrides

    paths, overrides = split_overrides(args.overrides)
    return [trajectory_folder(text) for text in (args.config, *paths)], overrides


def start(config, train, *, section: str, knows_unseen: bool = True):
    """The processes of a training, its configuration with the classes that the patches turned out to have, and them;
    classes in data.split.unseen are among them where the network can know what it never saw."""
    from cellflux_bridge.data.index import patch_index, taken_from_training
    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.training.processes import make_fabric, on_rank_zero

    fabric = make_fabric(train, section=section)
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)

    if config.data.split.unseen and not knows_unseen:
        found = patch_index(config.data, seed=config.seed).classes
        seen = [label for label in found if label not in config.data.split.unseen]
        config = config.model_copy(update={"data": config.data.model_copy(update={"classes": seen})})

    def fill_cache() -> None:
        taken = taken_from_training(patch_index(config.data, seed=config.seed))
        if taken and not (config.output / "splits.csv").exists():  # said when the run was begun
            print(taken)
        load_patches(config.data, seed=config.seed)

    on_rank_zero(fabric, fill_cache)
    patches = load_patches(config.data, seed=config.seed)
    names = {"classes": list(patches.classes), "batches": list(patches.batch_names) or None}
    data = config.data.model_copy(update=names)
    return fabric, config.model_copy(update={"data": data}), patches


def tell_trained(newest: Path, figures: Mapping[str, float]) -> None:
    """Print a finished training and its figures."""
    print(f"trained: {newest}\n" + "\n".join(f"  {name:<38} {value:.4g}" for name, value in figures.items()))


def tell_written(paths: Sequence[Path]) -> None:
    """Print the files that a command wrote."""
    for path in paths:
        print(f"wrote: {path}")

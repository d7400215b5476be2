"""Checkpoints: a folder a checkpoint, complete or absent, and nothing in it is ever unpickled.

<run>/checkpoints/step-00000500/
    model.safetensors     EMA weights
    config.yaml           the resolved run, from which the architecture is built again
    preprocessing.json    how a file's pixels become the network's input
    state.pt              raw weights, optimiser, step, seconds (loaded weights-only)
"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import regular, to_disk
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.data.preprocessing import Preprocessing

WEIGHTS, STATE, CONFIG, PREPROCESSING = "model.safetensors", "state.pt", "config.yaml", "preprocessing.json"


def _steps(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".tmp")


def save(
    run: Path,
    *,
    step: int,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    config: Config,
    preprocessing: Preprocessing,
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, then remove all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    building = folder.with_suffix(".tmp")
    for stale in (run / "checkpoints").glob("step-*.tmp"):  # what a kill left
        shutil.rmtree(stale, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, building / WEIGHTS)
        torch.save(state, building / STATE)
        (building / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        preprocessing.save(building / PREPROCESSING)
        for path in (*building.iterdir(), building):
            to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(building, folder)
        to_disk(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        last = _steps(run)
        kept = f"the last good checkpoint is {last[-1]}" if last else "no earlier checkpoint exists"
        raise UserError(f"{folder}: cannot be written ({error}); is the disk full? {kept}") from error
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def exists(run: Path) -> bool:
    """Whether a run folder has a checkpoint."""
    return any((run / "checkpoints").glob("step-*[0-9]"))


def latest(run: Path) -> Path:
    """The newest checkpoint of a run folder (or the folder itself where it is a checkpoint)."""
    if (run / WEIGHTS).exists():
        return run
    if found := _steps(run):
        return found[-1]
    raise UserError(f"{run}: holds no checkpoint; expected a run folder that training wrote")


def step_of(checkpoint: Path) -> int:
    """The training step in a checkpoint folder's name; 0 where the folder was renamed."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def read_config(checkpoint: Path) -> Config:
    return load_config(checkpoint / CONFIG)


def weights_digest(model: nn.Module, *, view: str = "") -> str:
    """A hash (32 hex digits) of a network's weights, and of its `view` of images, which is no weight."""
    digest = hashlib.blake2b(view.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def without_memory(build: Callable[[], nn.Module], *, origin: Path | str) -> dict[str, torch.Tensor]:
    """The state of the network that `build` makes, as tensors that have shapes alone (torch's meta device).

    Sizes that come from somebody else are weighed with it before they take memory. Raises UserError, with `origin` in
    front, for sizes of which no network can be made.
    """
    try:
        with torch.device("meta"):
            return build().state_dict()
    except UserError:
        raise
    except Exception as error:  # torch stumbles over sizes that it cannot count in many ways
        raise UserError(f"{origin}: describes no network that can be built ({error!s:.200})") from error


def load_network(checkpoint: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes of a checkpoint's configuration, with the EMA weights.

    UserError where the weights are truncated, or of another architecture: the latter before the network takes memory.
    """
    _require_shapes(checkpoint / WEIGHTS, without_memory(build, origin=checkpoint / CONFIG))
    model = build()
    load_weights(checkpoint, model)
    return model


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load EMA weights strictly; UserError for a truncated file or another architecture."""
    path = checkpoint / WEIGHTS
    _require_shapes(path, model.state_dict())
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{path}: {abbreviate(broken)} hold NaN or infinite numbers; train again, or bring it back")
    model.load_state_dict(weights, strict=True)


def init_from(run: Path, model: nn.Module, config: Config) -> None:
    """Load the averaged weights of another run's newest checkpoint into a network that is about to be trained.

    UserError for a run without checkpoint, of another architecture, or in which numbers mean other classes or batches.
    """
    folder = latest(run)
    other = read_config(folder)
    for key in ("data.classes", "data.batches"):
        before, now = other.value(key), config.value(key)
        if before != now:
            raise UserError(
                f"train.init_from: {folder} was trained with {key}={abbreviate(before or ['none'])}, here they are "
                f"{abbreviate(now or ['none'])}; set {key} alike"
            )
    if leaked := sorted(set(config.data.split.unseen) - set(other.data.split.unseen)):
        raise UserError(
            f"train.init_from: {folder} was trained on {abbreviate(leaked)}, which no training here may see "
            "(data.split.unseen); train it with the same data.split.unseen"
        )
    load_weights(folder, model)


def _require_shapes(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """UserError where a weights file, of which names and shapes are read, is truncated or has others than `state`."""
    own = {name: list(tensor.shape) for name, tensor in state.items()}
    try:
        with safe_open(regular(path), framework="numpy") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    differing = {
        "tensors missing": own.keys() - found.keys(),
        "unknown": found.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & found.keys() if own[name] != found[name]},
    }
    if any(differing.values()):
        counts = ", ".join(f"{len(names)} {what} {sorted(names)[:3]}" for what, names in differing.items())
        raise UserError(f"{path}: of another architecture than its config.yaml describes: {counts}")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or not a weights file ({error}); train again, or bring it back")


def load_state(checkpoint: Path, *, most: int | None = None) -> dict[str, Any]:
    """What training needs to go on. UserError for a truncated file, and for one that would take more memory than it
    has bytes, or than `most` bytes."""
    path = checkpoint / STATE
    try:
        with zipfile.ZipFile(regular(path)) as file:
            num_bytes = sum(entry.file_size for entry in file.infolist())
        most = min(path.stat().st_size, most or num_bytes)
        if num_bytes > most:
            raise ValueError(f"it declares {num_bytes:,} bytes, expected at most {most:,}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        raise UserError(f"{path}: truncated or not a training state ({error})") from error

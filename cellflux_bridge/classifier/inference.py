"""Predictions of trained classifiers for patches and for states."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from cellflux_bridge import checkpoint, images
from cellflux_bridge.classifier.model import PatchClassifier, time_bin
from cellflux_bridge.classifier.states import LabelledBatch
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches

_CHUNK = 256


def build_classifier(config: Config, *, download: bool = True) -> PatchClassifier:
    """The (untrained) classifier of a resolved configuration; `download`: whether pretrained weights are fetched."""
    options = config.classifier.model_dump(include={"backbone", "pretrained", "sees", "view", "jitter", "blur"})
    channels = build_codec(config).channels if config.classifier.sees == "state" else config.data.channels
    options |= {"channels": channels, "source_image": config.condition.source_image, "download": download}
    return PatchClassifier(len(config.data.classes), **options)


def load(folder: Path, device: torch.device) -> PatchClassifier:
    """The classifier of a checkpoint folder, temperature included, in evaluation mode."""
    config = checkpoint.read_config(folder)
    return checkpoint.load_network(folder, lambda: build_classifier(config, download=False)).to(device).eval()


@torch.no_grad()
def _in_chunks(function: Callable, batch: torch.Tensor, device: torch.device, chunk: int) -> np.ndarray:
    return torch.cat([function(images.encode(part.to(device))).float().cpu() for part in batch.split(chunk)]).numpy()


def predict(model: PatchClassifier, batch: torch.Tensor, *, device: torch.device, chunk: int = _CHUNK) -> np.ndarray:
    """Calibrated class probabilities (N, num_classes) of uint8 patches (N, 3, H, W)."""
    return np.exp(_in_chunks(model.eval().log_probabilities, batch, device, chunk))


def features(model: PatchClassifier, batch: torch.Tensor, *, device: torch.device, chunk: int = _CHUNK) -> np.ndarray:
    """Inputs of the last layer, (N, D) float32, for uint8 patches (N, 3, H, W)."""
    return _in_chunks(model.eval().features, batch, device, chunk)


def patch_logits(
    model: PatchClassifier,
    patches: Patches,
    indices: np.ndarray,
    *,
    device: torch.device,
    chunk: int = _CHUNK,
    flips: bool = False,
) -> np.ndarray:
    """Logits (N, num_classes) of the middle patches of a data set, never more than a chunk of them in memory.

    With `flips` they are means over the patch, its two mirror images and its half turn, as training flips patches.
    """
    sides = [(), (3,), (2,), (2, 3)] if flips else [()]

    def mean_logits(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(x.flip(turned)).float() for turned in sides]).mean(0)

    model.eval()
    parts = np.split(indices, range(chunk, len(indices), chunk))
    return np.concatenate([_in_chunks(mean_logits, patches.centre(part), device, chunk) for part in parts])


@torch.no_grad()
def state_logits(
    model: PatchClassifier, batches: Iterable[LabelledBatch], *, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits and soft labels (N, num_classes) of batches of states, and the time bin (N,) of each state."""
    model.eval()
    found = []
    for x, y, t, x0 in batches:
        logits = model(x.to(device), t.to(device), None if x0 is None else x0.to(device)).float().cpu()
        found.append((logits, y, time_bin(t)))
    return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))

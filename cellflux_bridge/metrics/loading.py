"""Networks from the folders of their runs, or by name: any timm model with its weights, which prepares images as it
knows them. And the check that sequences and the classifiers that judge them come from the same patches.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import run_of
from cellflux_bridge.classifier import inference
from cellflux_bridge.config import Config, load_config, parse_overrides
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.images import to_rgb
from cellflux_bridge.metrics import nuclei
from cellflux_bridge.metrics.fidelity import require_finite
from cellflux_bridge.metrics.networks import Network

USES = ("judge", "features", "scores")
_CHUNK = 1024
_PREFIXES = ("timm:", "hf-hub:", "local-dir:")


def is_name(text: str) -> bool:
    """Whether a text names an extractor; else it is the folder of a classifier's run."""
    return text == nuclei.NAME or text.startswith(_PREFIXES)


class NamedExtractor(nn.Module):
    """The pretrained model of `timm:NAME`, `timm:NAME@WEIGHTS_FILE`, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Images are resized to the side that its configuration names (bicubic, antialiased) and get its mean and standard
    deviation. Raises UserError for an unknown model, and for weights that are missing or do not fit.
    """

    def __init__(self, name: str):
        super().__init__()
        model, _, file = name.removeprefix("timm:").partition("@" if name.startswith("timm:") else "\0")
        overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        if file and not Path(file).is_file():
            raise UserError(f"--features {name}: {file}: no such file; expected weights of {model}")
        try:
            self.net = timm.create_model(model, pretrained=True, num_classes=0, **overlay)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, SafetensorError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"--features {name}: cannot be loaded ({reason}); expected timm:NAME, timm:NAME@WEIGHTS_FILE, "
                "hf-hub:OWNER/NAME or local-dir:FOLDER (config.json and weights of a timm model), or a run's folder; "
                "weights that are not here already are fetched, which takes a connection"
            ) from error
        data = timm.data.resolve_model_data_config(self.net)
        self.size: int = data["input_size"][-1]
        self.view = f"{type(self.net).__name__} at {self.size} px"
        self.register_buffer("mean", torch.tensor(data["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(-1, 1, 1))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D), pooled over space, of patches (B, 3, H, W) in [-1, 1]."""
        return self.net(self._input(x))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs (B, C, h, w) of its stages, finest first."""
        return self.net.forward_intermediates(self._input(x), intermediates_only=True)

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return ((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std


def load_networks(
    runs: Sequence[tuple[str, Path | str]],
    *,
    source: str,
    target: str,
    overrides: Sequence[str] = (),
    device: torch.device,
    cache: Path | None = None,
) -> list[Network]:
    """The newest checkpoints of (use, run folder), in the order of `USES`. `overrides` apply to all but a severity
    estimator. An extractor may be a name instead of a folder (`nuclei.NAME`, or see `NamedExtractor`): its patches are
    the first judge's.

    Raises UserError for a guide, for a run that is named twice, and for one that does not know the classes.
    """
    networks: dict[str, Network] = {}
    for use, run in sorted(runs, key=lambda each: USES.index(each[0])):
        if use == "features" and is_name(str(run)):
            network = _load_named(str(run), next(iter(networks.values())))
        else:
            folder, given = checkpoint.latest(Path(run)), () if use == "scores" else overrides
            network = _load(use, folder, source, target, given, device, cache)
        if other := networks.get(network.digest):
            twice = network.checkpoint == other.checkpoint
            raise UserError(
                f"{run}: {'is named twice' if twice else 'has the very weights of another network here'}; judges, "
                "--features and --scores must be separately trained networks, each with a classifier.seed of its own"
            )
        networks[network.digest] = network
    names = [network.name for network in networks.values()]
    return [
        replace(network, name=str(run_of(network.checkpoint))) if names.count(network.name) > 1 else network
        for network in networks.values()
    ]


def _load_named(name: str, judge: Network) -> Network:
    model = nuclei.NucleiExtractor(judge.patches) if name == nuclei.NAME else NamedExtractor(name)
    model = model.to(judge.device).eval()
    digest = checkpoint.weights_digest(model, view=model.view)
    return replace(
        judge, name=name, use="features", view=model.view, checkpoint=name, weights=None, model=model, digest=digest
    )


def judge_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a classifier's checkpoint; UserError for a guide, which is no judge."""
    config = load_config(folder / checkpoint.CONFIG, overrides)
    if config.classifier.role == "guide":
        raise UserError(
            f"{folder}: is a guide (classifier.role=guide), whose opinion the frames were made to please; judge them "
            "with a classifier trained apart, with classifier.role=judge"
        )
    return config


def _load(use: str, folder: Path, source: str, target: str, overrides, device, cache) -> Network:
    config = judge_config(folder, overrides)
    classes = tuple(config.data.classes)
    for label in (source, target):
        if label not in classes:
            trained = f"it was trained on {', '.join(classes)}"
            raise UserError(f"{folder}: does not know the class {label!r} of the sequences; {trained}")
    weights = np.array([label == target for label in classes], np.float32)
    if use == "scores":
        if config.classifier.labels != "score" or {source, target} != {classes[0], classes[-1]}:
            raise UserError(
                f"--scores {folder}: expected a classifier trained with classifier.labels=score from {source} to "
                f"{target}; found labels={config.classifier.labels} and the classes {', '.join(classes)}"
            )
        weights = np.linspace(0, 1, len(classes), dtype=np.float32)
        weights = weights if target == classes[-1] else 1 - weights
    model = inference.load(folder, device)
    return Network(
        name="/".join(run_of(folder).resolve().parts[-2:]),
        use=use,
        view=config.classifier.view,
        checkpoint=folder,
        patches=load_patches(config.data, seed=config.seed),
        source=source,
        target=target,
        weights=weights,
        model=model,
        digest=checkpoint.weights_digest(model, view=config.classifier.view),
        device=device,
        cache=cache,
    )


def require_same_data(folders: Sequence[Path], runs: Sequence[Path], overrides: Sequence[str]) -> None:
    """UserError if the config.yaml of a trajectory folder names another data.root or data.layout than a classifier's
    run, whose real patches the frames would be compared with. A key in `overrides` is not checked, nor are frames
    without a configuration."""
    given = parse_overrides(overrides).get("data", {})
    for folder in folders:
        if not (folder / checkpoint.CONFIG).exists():
            continue
        theirs = load_config(folder / checkpoint.CONFIG)
        for run in runs:
            ours = checkpoint.read_config(checkpoint.latest(run))
            for key in ("root", "layout"):
                if key not in given and _place(theirs, key) != _place(ours, key):
                    found = (config.value(f"data.{key}") for config in (theirs, ours))
                    there, here = (value if isinstance(value, str) else json.dumps(value) for value in found)
                    raise UserError(
                        f"{folder}: was made from data.{key}={there}, but {run} would compare it with real patches of "
                        f"data.{key}={here}; say which are meant: data.{key}={there} or data.{key}={here}"
                    )


def _place(config: Config, key: str):
    if key == "root":
        return config.data.root.expanduser().resolve()
    # Which classes are left out is no other place: an extractor may have learned more of them than are compared.
    return {name: value for name, value in config.value("data.layout").items() if name != "ignore"}


def cell_extractor(name: str, *, channels: int, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """A function from cells (N, C, H, W) uint8 to features (N, D) float64: of a judge's run that was trained on as many
    channels, or of a `NamedExtractor`, which sees other than three channels as `images.to_rgb` shows them."""
    if name == nuclei.NAME:
        raise UserError(f"--features {name}: knows stained tissue, no cells; name a judge's run, or timm:NAME")
    if is_name(name):
        model, is_rgb = NamedExtractor(name).to(device).eval(), True
    else:
        folder = checkpoint.latest(Path(name))
        if (known := judge_config(folder).data.channels) != channels:
            raise UserError(f"--features {name}: was trained on {known} channels, the cells have {channels}")
        model, is_rgb = inference.load(folder, device), False

    def extract(cells: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(cells), _CHUNK):
            part = np.asarray(cells[start : start + _CHUNK])
            if is_rgb:
                part = to_rgb(part.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            found.append(inference.features(model, torch.from_numpy(part.copy()), device=device))
        features = np.concatenate(found).astype(np.float64)
        require_finite(features, name=name)
        return features

    return extract

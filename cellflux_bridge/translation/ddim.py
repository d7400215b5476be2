"""DDIM stairs as a Python object: `DDIMTranslator.load("runs/ddim_lung").translate(images)`."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.config import PLACES_AND_PACE, Config, load_config, parse_overrides
from cellflux_bridge.config.registry import trusting
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.ddim.depths import require_depths, uniform_depths
from cellflux_bridge.ddim.networks import Denoiser, NoisyClassifier, load_foreign
from cellflux_bridge.ddim.schedule import respaced
from cellflux_bridge.ddim.stairs import DepthRule, ddim_stairs, fourier_rule
from cellflux_bridge.ddim.steps import NoisePredictor
from cellflux_bridge.ddim.task import STAGES, build_denoiser, build_noisy_classifier
from cellflux_bridge.training.run import require_alike
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, linear_soft_labels
from cellflux_bridge.translation.base import Translator, require_finite, translation_fabric
from cellflux_bridge.translation.settings import TranslateConfig

# Keys of `translate` that DDIM stairs read; all others stand in `ddim`.
_HEEDED = ("source", "target", "split", "num", "levels", "batch_size")
_NETWORKS = ("denoiser", "source_denoiser", "classifier")
# Weights count by their digest, not by their place.
_WEIGHTS = tuple(f"ddim.{name}.weights" for name in _NETWORKS)


class DDIMTranslator(Translator):
    """DDIM stairs of `translate.levels` levels, nominally k / K, as Cellflow makes them.

    `denoiser` decodes, and encodes unless there is a `source_denoiser`; `options` are those of every Translator.
    """

    def __init__(
        self,
        *,
        denoiser: Denoiser,
        source_denoiser: Denoiser | None = None,
        classifier: NoisyClassifier | None = None,
        **options,
    ):
        super().__init__(**options)
        networks = (denoiser, source_denoiser, classifier)
        for network in filter(None, networks):
            network.to(self.fabric.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._weights = ["" if network is None else checkpoint.weights_digest(network) for network in networks]
        self._schedule, self._classifier = respaced(self.config.ddim.timesteps), classifier
        self._decoder = self._predictor(denoiser)
        self._encoder = self._decoder if source_denoiser is None else self._predictor(source_denoiser)

    def _predictor(self, denoiser: Denoiser) -> NoisePredictor:
        ddim = self.config.ddim
        null_class = denoiser.null_class if ddim.guidance == "classifier_free" else None
        return NoisePredictor(denoiser.eps, null_class=null_class, weight=ddim.weight)

    @classmethod
    def load(
        cls, run: str | Path, overrides: Sequence[str] = (), *, fabric: Fabric | None = None, trust: bool = False
    ) -> "DDIMTranslator":
        """The newest networks of a run folder that train-ddim wrote, or a YAML file that names foreign weights.

        `overrides` are `key.sub=value` settings of this use, such as ddim.depths=fourier or translate.num=10. Where
        ddim.denoiser.weights or ddim.classifier.weights is set, that file takes the place of the trained network.
        With `trust`, classes of foreign modules that the run names are imported, which runs their code, and caches and
        phantoms are made where it says. Raises UserError for a network that is missing, was trained otherwise, or does
        not fit the configuration.
        """
        path = Path(run)
        where, output = (path / checkpoint.CONFIG, path) if path.is_dir() else (path, None)
        with trusting(trust):
            config = load_config(where, overrides, output=output)
            if config.data.classes is None:
                raise UserError(f"{path}: data.classes: name them, in the order of the networks' class numbers")
            networks, folders = _load_networks(config)
            return cls(
                config=config,
                step=checkpoint.step_of(folders["denoiser"]) if "denoiser" in folders else 0,
                fabric=fabric or translation_fabric(config.ddim.denoiser.train, section="ddim.denoiser.train"),
                given=parse_overrides(overrides).get("translate"),
                preprocessing=_preprocessing(config, folders.values()),
                **networks,
            )

    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        for key in sorted(set(given) - set(_HEEDED)):
            read = ", ".join(_HEEDED)
            raise UserError(f"translate.{key}: DDIM stairs do not read it; leave it out. They read {read}, and `ddim`")
        if "levels" in given and isinstance(self.config.ddim.depths, list):
            raise UserError("translate.levels: not read where ddim.depths lists the depths; leave out one of them")

    def _depths(self, settings: TranslateConfig) -> tuple[int, torch.Tensor | DepthRule]:
        """The number K of levels, and depths (K,) or the rule that finds them."""
        wanted, timesteps = self.config.ddim.depths, len(self._schedule)
        if isinstance(wanted, list):
            require_depths(wanted, timesteps)
            return len(wanted), torch.tensor(wanted)
        num = settings.of("depth")["levels"]
        if isinstance(num, list):
            raise UserError("translate.levels: the levels of DDIM stairs are nominal, k / K; give their number K")
        uniform = torch.tensor(uniform_depths(timesteps, num))
        return num, uniform if wanted == "uniform" else fourier_rule(num, mirrored=wanted == "fourier")

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        num, _ = self._depths(settings)
        used = self.config.flat(of=("seed", "data", "ddim"), without=(*PLACES_AND_PACE, *_WEIGHTS))
        canonical = json.dumps([used, settings.split, self._weights], sort_keys=True)
        config_hash = f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}@{self.step}"
        levels = tuple(k / num for k in range(num + 1))
        return TrajectoryHeader("ddim", settings.source, settings.target, self.classes, levels, config_hash)

    def _name(self, settings: TranslateConfig) -> str:
        return f"{super()._name(settings)}_ddim"

    def _translate_batch(self, batch, ids, settings, context) -> Trajectory:
        x0, header = image_io.encode(batch).to(self.fabric.device), self._header(settings)
        numbers = [self.classes.index(name) for name in (settings.source, settings.target)]
        quiet = not self.fabric.is_global_zero
        bar = progress(desc=f"{len(x0)} stairs", unit="evaluation", leave=False, disable=quiet)
        with bar, self.fabric.autocast():
            result = ddim_stairs(
                x0,
                *(torch.full((len(x0),), number, device=x0.device) for number in numbers),
                schedule=self._schedule,
                encoder=self._encoder,
                decoder=self._decoder,
                depths=self._depths(settings)[1],
                classifier=self._classifier,
                scale=self.config.ddim.scale,
                batch_size=settings.batch_size,
                report=bar.update,
            )
        require_finite(result.frames, ids)
        return Trajectory(
            header,
            image_io.decode(result.frames).cpu().numpy(),
            linear_soft_labels(header, len(ids)),
            *map(tuple, (ids, result.forwards.tolist(), result.gradients.tolist())),
            np.pad(result.depths.numpy().T.astype(float), ((1, 0), (0, 0))),
        )


def _load_networks(config: Config) -> tuple[dict[str, nn.Module], dict[str, Path]]:
    """The networks that a configuration means, and the checkpoint folders of those without foreign weights, by name."""
    ddim, networks, folders = config.ddim, {}, {}
    wanted = (True, ddim.source_denoiser is not None, ddim.guidance == "classifier")
    for name in compress(_NETWORKS, wanted):
        settings = getattr(ddim, name)
        build = build_noisy_classifier if name == "classifier" else partial(build_denoiser, size=settings)
        if settings.weights is not None:
            networks[name] = load_foreign(partial(build, config), settings.weights.expanduser(), key=f"ddim.{name}")
        else:
            networks[name], folders[name] = _load_trained(config, name)
    return networks, folders


def _load_trained(config: Config, name: str) -> tuple[nn.Module, Path]:
    """The newest denoiser or classifier of a run, and its checkpoint."""
    stage = "denoiser" if name == "denoiser" else "noisy_classifier"
    folder = checkpoint.latest(config.output / stage)
    trained = checkpoint.read_config(folder)
    ignore = (*STAGES[stage].unused, "ddim.guidance", f"ddim.{name}.train")
    require_alike(folder, trained, config, uses=STAGES[stage].uses, ignore=ignore)
    network = checkpoint.load_network(folder, lambda: STAGES[stage].build(trained))
    if name == "denoiser" and config.ddim.guidance == "classifier_free" and network.null_class is None:
        raise UserError(f"{folder}: has no null class; train with ddim.guidance=classifier_free, into another output")
    return network, folder


def _preprocessing(config: Config, folders: Collection[Path]) -> Preprocessing:
    """That of the trained networks; of the data where all weights are foreign."""
    found = [Preprocessing.load(folder / checkpoint.PREPROCESSING) for folder in folders]
    if not found:
        is_fitted = config.data.stain.mode == "normalise"
        data = config.data
        return load_patches(data, seed=config.seed).preprocessing if is_fitted else Preprocessing.of(data)
    if found[0] != found[-1]:
        raise UserError(
            f"{config.output}: its networks saw patches of different preprocessings; train one of them again"
        )
    return found[0]

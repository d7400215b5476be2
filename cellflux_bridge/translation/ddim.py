"""DDIM stairs as a Python object: `DDIMTranslator.load("runs/ddim_lung").translate(images)`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

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
from cellflux_bridge.training.run import differences
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, linear_soft_labels
from cellflux_bridge.translation.base import Translator, translation_fabric
from cellflux_bridge.translation.settings import TranslateConfig

# Keys of `translate` that DDIM stairs read; all else that they do stands in `ddim`.
_HEEDED = ("source", "target", "split", "num", "levels", "batch_size")
_NETWORKS = ("denoiser", "source_denoiser", "classifier")
# What sequences do not depend on. Weights count by their digest, not by their place.
_NO_PART_IN_SEQUENCES = (
    *("video", "classifier", "translate", "train"),
    *("coupling", "path", "codec", "velocity", "condition", "pairs"),
    *(f"ddim.{name}.weights" for name in _NETWORKS),
)


class DDIMTranslator(Translator):
    """DDIM stairs of `translate.levels` levels, nominally k / K, as Cellflow makes them.

    `denoiser` decodes, and encodes unless there is a `source_denoiser`.
    """

    def __init__(
        self,
        *,
        config: Config,
        preprocessing: Preprocessing,
        step: int,
        fabric: Fabric,
        denoiser: Denoiser,
        source_denoiser: Denoiser | None = None,
        classifier: NoisyClassifier | None = None,
        given: Mapping[str, Any] | None = None,
    ):
        super().__init__(config=config, preprocessing=preprocessing, step=step, fabric=fabric, given=given)
        networks = (denoiser, source_denoiser, classifier)
        for network in filter(None, networks):
            network.to(fabric.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._weights = ["" if network is None else checkpoint.weights_digest(network) for network in networks]
        self._schedule = respaced(config.ddim.timesteps)
        self._classifier = classifier
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
        With `trust`, classes of foreign modules that the run names are imported, which runs their code. Raises
        UserError for a network that is missing, was trained otherwise, or does not fit the configuration.
        """
        path = Path(run)
        where, output = (path / checkpoint.CONFIG, path) if path.is_dir() else (path, None)
        with trusting(trust):
            config = load_config(where, overrides, output=output)
            if config.data.classes is None:
                raise UserError(f"{path}: data.classes: name them, in the order of the networks' class numbers")
            loader = _Loader(config)
            return cls(
                config=config,
                step=loader.step,
                fabric=fabric or translation_fabric(config.ddim.denoiser.train, section="ddim.denoiser.train"),
                given=parse_overrides(overrides).get("translate"),
                preprocessing=loader.preprocessing(),
                **loader.networks,
            )

    def _settings(self, source: str | None, target: str | None, options: Mapping[str, Any]) -> TranslateConfig:
        settings = super()._settings(source, target, options)
        self._depths(settings)
        return settings

    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        for key in sorted(set(given) - set(_HEEDED)):
            raise UserError(
                f"translate.{key}: DDIM stairs do not read it; leave it out. They read {', '.join(_HEEDED)}, and the "
                "keys of `ddim`"
            )
        if "levels" in given and isinstance(self.config.ddim.depths, list):
            raise UserError(
                "translate.levels: not read where ddim.depths lists the depths, one a level; leave it out, or set "
                "ddim.depths=uniform"
            )

    def _depths(self, settings: TranslateConfig) -> torch.Tensor | DepthRule:
        """Depths (K,), or the rule that finds them."""
        wanted, timesteps = self.config.ddim.depths, len(self._schedule)
        if isinstance(wanted, list):
            require_depths(wanted, timesteps)
            return torch.tensor(wanted)
        levels = settings.of("depth")["levels"]
        if isinstance(levels, list):
            raise UserError(
                "translate.levels: the levels of DDIM stairs are nominal, k / K; give their number, and depths as "
                "ddim.depths"
            )
        uniform = torch.tensor(uniform_depths(timesteps, levels))
        return uniform if wanted == "uniform" else fourier_rule(levels, mirrored=wanted == "fourier")

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        wanted = self.config.ddim.depths
        num = len(wanted) if isinstance(wanted, list) else settings.of("depth")["levels"]
        used = self.config.flat(without=(*PLACES_AND_PACE, *_NO_PART_IN_SEQUENCES))
        canonical = json.dumps([used, settings.split, self._weights], sort_keys=True)
        return TrajectoryHeader(
            method="ddim",
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=tuple(k / num for k in range(num + 1)),
            config_hash=f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}@{self.step}",
        )

    def _name(self, settings: TranslateConfig) -> str:
        return f"{super()._name(settings)}_ddim"

    def _translate_batch(self, batch: torch.Tensor, ids: Sequence[str], settings: TranslateConfig) -> Trajectory:
        x0 = image_io.encode(batch).to(self.fabric.device)
        y_source, y_target = (
            torch.full((len(x0),), self.classes.index(name), device=x0.device)
            for name in (settings.source, settings.target)
        )
        quiet = not self.fabric.is_global_zero
        bar = progress(desc=f"{len(x0)} stairs", unit="evaluation", leave=False, disable=quiet)
        with bar, self.fabric.autocast():
            result = ddim_stairs(
                x0,
                y_source,
                y_target,
                schedule=self._schedule,
                encoder=self._encoder,
                decoder=self._decoder,
                depths=self._depths(settings),
                classifier=self._classifier,
                scale=self.config.ddim.scale,
                batch_size=settings.batch_size,
                report=bar.update,
            )
        header = self._header(settings)
        return Trajectory(
            header,
            image_io.decode(result.frames).cpu().numpy(),
            linear_soft_labels(header, len(ids)),
            tuple(ids),
            tuple(result.forwards.tolist()),
            tuple(result.gradients.tolist()),
            np.pad(result.depths.numpy().T.astype(float), ((1, 0), (0, 0))),
        )


class _Loader:
    """The networks that a configuration means, from checkpoints of its run or from foreign files."""

    def __init__(self, config: Config):
        self._config, ddim = config, config.ddim
        self._prepared: dict[Path, Preprocessing] = {}
        self.step = 0
        self.networks = {"denoiser": self._network("denoiser", build_denoiser)}
        if ddim.source_denoiser is not None:
            like = ddim.model_copy(update={"denoiser": ddim.source_denoiser})
            network = build_denoiser(config.model_copy(update={"ddim": like}))
            self.networks["source_denoiser"] = self._foreign(network, "source_denoiser")
        if ddim.guidance == "classifier":
            self.networks["classifier"] = self._network("classifier", build_noisy_classifier)

    def _network(self, key: str, build) -> Denoiser | NoisyClassifier:
        if getattr(self._config.ddim, key).weights is not None:
            return self._foreign(build(self._config), key)
        stage = "denoiser" if key == "denoiser" else "noisy_classifier"
        folder = checkpoint.latest(self._config.output / stage)
        trained = checkpoint.read_config(folder)
        other = ("ddim.guidance", f"ddim.{key}.train")
        differing = differences(trained, self._config, ignore=(*STAGES[stage].unused, *other))
        if differing:
            raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
        self._prepared[folder] = Preprocessing.load(folder / checkpoint.PREPROCESSING)
        network = build(trained)
        checkpoint.load_weights(folder, network)
        if key == "denoiser":
            self.step = checkpoint.step_of(folder)
            if self._config.ddim.guidance == "classifier_free" and network.null_class is None:
                raise UserError(
                    f"{folder}: has no null class, having been trained with ddim.guidance={trained.ddim.guidance}; "
                    "classifier-free guidance needs a training of its own"
                )
        return network

    def _foreign(self, network, key: str):
        load_foreign(network.net, getattr(self._config.ddim, key).weights.expanduser(), key=f"ddim.{key}")
        return network

    def preprocessing(self) -> Preprocessing:
        """That of the trained networks; of the data where all weights are foreign."""
        data = self._config.data
        if not self._prepared:
            if data.stain.mode == "normalise":
                return load_patches(data, seed=self._config.seed).preprocessing
            return Preprocessing(data.image_size, data.crop)
        (first, preprocessing), *others = self._prepared.items()
        for folder, found in others:
            if found != preprocessing:
                raise UserError(f"{folder}: saw patches of another preprocessing than {first}")
        return preprocessing

"""The reference bridge as a Python object: `DDIMTranslator.load("runs/ddim_lung").translate(images)`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from cellflux_bridge.ddim.steps import ClassifierFree, Conditional, NoisePredictor
from cellflux_bridge.ddim.task import STAGES, build_denoiser, build_noisy_classifier
from cellflux_bridge.training.run import differences
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, linear_soft_labels
from cellflux_bridge.translation.base import Translator, translation_fabric
from cellflux_bridge.translation.settings import TranslateConfig

# Keys of `translate` that the bridge heeds; what else it does stands in `bridge`.
_HEEDED = ("source", "target", "split", "num", "levels", "batch_size")
_NO_PART_IN_SEQUENCES = (
    *("video", "classifier", "translate", "train"),
    *("coupling", "path", "velocity", "condition", "pairs"),
)


class DDIMTranslator(Translator):
    """Cellflow's classifier-guided DDIM bridge: stairs of `translate.levels` levels, nominally k / K.

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
        denoiser, source_denoiser, classifier = (
            None
            if network is None
            else network.to(fabric.device, memory_format=torch.channels_last).eval().requires_grad_(False)
            for network in (denoiser, source_denoiser, classifier)
        )
        self._weights = [
            "" if network is None else checkpoint.weights_digest(network)
            for network in (denoiser, source_denoiser, classifier)
        ]
        self._schedule = respaced(config.ddim.timesteps)
        self._classifier = classifier
        self._decoder = self._predictor(denoiser)
        self._encoder = self._decoder if source_denoiser is None else self._predictor(source_denoiser)

    def _predictor(self, denoiser: Denoiser) -> NoisePredictor:
        ddim = self.config.ddim
        if ddim.guidance != "classifier_free":
            return Conditional(denoiser.eps)
        return ClassifierFree(denoiser.eps, null_class=denoiser.null_class, weight=ddim.weight)

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
        with trusting(trust):
            return cls._load(Path(run), overrides, fabric)

    @classmethod
    def _load(cls, path: Path, overrides: Sequence[str], fabric: Fabric | None) -> "DDIMTranslator":
        config = (
            load_config(path / checkpoint.CONFIG, overrides, output=path)
            if path.is_dir()
            else load_config(path, overrides)
        )
        if config.data.classes is None:
            raise UserError(f"{path}: data.classes: name them, in the order of the networks' class numbers")
        loader = _Loader(config)
        denoiser = loader.denoiser()
        source_denoiser = None if config.ddim.source_denoiser is None else loader.source_denoiser()
        classifier = loader.classifier() if config.ddim.guidance == "classifier" else None
        if fabric is None:
            fabric = translation_fabric(config.ddim.denoiser.train, section="ddim.denoiser.train")
        return cls(
            config=config,
            preprocessing=loader.preprocessing(),
            step=loader.step,
            fabric=fabric,
            denoiser=denoiser,
            source_denoiser=source_denoiser,
            classifier=classifier,
            given=parse_overrides(overrides).get("translate"),
        )

    def _settings(self, source: str | None, target: str | None, options: Mapping[str, Any]) -> TranslateConfig:
        settings = super()._settings(source, target, options)
        self._depths(settings)
        return settings

    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        for key in sorted(set(given) - set(_HEEDED)):
            raise UserError(
                f"translate.{key}: has no part in the reference bridge, which heeds {', '.join(_HEEDED)}, and the keys "
                "of `bridge`; leave it out"
            )
        if "levels" in given and isinstance(self.config.ddim.depths, list):
            raise UserError(
                "translate.levels: has no part where ddim.depths lists the depths, one a level; leave it out, or set "
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
                "translate.levels: the reference bridge's levels are nominal, k / K; give their number, and depths as "
                "ddim.depths"
            )
        uniform = torch.tensor(uniform_depths(timesteps, levels))
        return uniform if wanted == "uniform" else fourier_rule(levels, mirrored=wanted == "fourier")

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        wanted = self.config.ddim.depths
        num = len(wanted) if isinstance(wanted, list) else settings.of("depth")["levels"]
        return TrajectoryHeader(
            method="ddim",
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=tuple(k / num for k in range(num + 1)),
            config_hash=f"{self._digest(settings)}@{self.step}",
        )

    def _digest(self, settings: TranslateConfig) -> str:
        """A short hash of all that the sequences are made with, the weights of the networks included."""
        places = tuple(f"ddim.{name}.weights" for name in ("denoiser", "source_denoiser", "classifier"))
        used = self.config.flat(without=(*PLACES_AND_PACE, *_NO_PART_IN_SEQUENCES, *places))
        canonical = json.dumps([used, settings.split, self._weights], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

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
        )


class _Loader:
    """The networks that a configuration means, from checkpoints of its run or from foreign files."""

    def __init__(self, config: Config):
        self._config = config
        self._prepared: dict[Path, Preprocessing] = {}
        self.step = 0

    def denoiser(self) -> Denoiser:
        ddim = self._config.ddim
        if ddim.denoiser.weights is not None:
            return self._foreign(build_denoiser(self._config), ddim.denoiser.weights, "ddim.denoiser")
        folder, trained = self._trained("denoiser")
        self.step = checkpoint.step_of(folder)
        network = build_denoiser(trained)
        checkpoint.load_weights(folder, network)
        if ddim.guidance == "classifier_free" and network.null_class is None:
            raise UserError(
                f"{folder}: has no null class, having been trained with ddim.guidance={trained.ddim.guidance}; "
                "classifier-free guidance needs a training of its own"
            )
        return network

    def source_denoiser(self) -> Denoiser:
        ddim = self._config.ddim
        source = ddim.model_copy(update={"denoiser": ddim.source_denoiser})
        network = build_denoiser(self._config.model_copy(update={"ddim": source}))
        return self._foreign(network, ddim.source_denoiser.weights, "ddim.source_denoiser")

    def classifier(self) -> NoisyClassifier:
        weights = self._config.ddim.classifier.weights
        if weights is not None:
            return self._foreign(build_noisy_classifier(self._config), weights, "ddim.classifier")
        folder, trained = self._trained("noisy_classifier")
        network = build_noisy_classifier(trained)
        checkpoint.load_weights(folder, network)
        return network

    def _foreign(self, network, path: Path, key: str):
        load_foreign(network.net, path.expanduser(), key=key)
        return network

    def _trained(self, name: str) -> tuple[Path, Config]:
        folder = checkpoint.latest(self._config.output / name)
        trained = checkpoint.read_config(folder)
        key = "denoiser" if name == "denoiser" else "classifier"
        other = ("ddim.guidance", f"ddim.{key}.train")
        differing = differences(trained, self._config, ignore=(*STAGES[name].unused, *other))
        if differing:
            raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
        self._prepared[folder] = Preprocessing.load(folder / checkpoint.PREPROCESSING)
        return folder, trained

    def preprocessing(self) -> Preprocessing:
        """That of the trained networks; of the data where all weights are foreign."""
        first, *others = self._prepared.items() or [(None, None)]
        for folder, found in others:
            if found != first[1]:
                raise UserError(f"{folder}: saw patches of another preprocessing than {first[0]}")
        if first[1] is not None:
            return first[1]
        data = self._config.data
        if data.stain.mode == "normalise":
            return load_patches(data, seed=self._config.seed).preprocessing
        return Preprocessing(data.image_size, data.crop)

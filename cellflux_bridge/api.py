"""A trained bridge as a Python object: `Bridge.load("runs/lung").translate(images)`."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from cellflux_bridge import images as image_io
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.config import Config, GuidanceConfig, TranslateConfig, load_config
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.errors import UserError
from cellflux_bridge.guidance.classifier import ClassifierGuided, require_form
from cellflux_bridge.guidance.classifier_free import ClassifierFree
from cellflux_bridge.path.base import Path as FlowPath
from cellflux_bridge.training import checkpoint, classifier
from cellflux_bridge.training.flow import build_flow
from cellflux_bridge.training.run import differences
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, between, linear_soft_labels
from cellflux_bridge.translator import Translator, translation_fabric
from cellflux_bridge.transport import stairs
from cellflux_bridge.transport.morph import Morph, morph, morph_levels, source_noise
from cellflux_bridge.velocity.condition import Condition

# Held-out sources, and levels, that adaptive spacing and the map from levels to conditions are measured on.
_PILOT_SOURCES, _PILOT_LEVELS = 64, 11


class Bridge(Translator):
    """A trained flow with all it needs to carry images from one class to another."""

    def __init__(
        self,
        *,
        config: Config,
        path: FlowPath,
        network: nn.Module,
        preprocessing: Preprocessing,
        step: int,
        fabric: Fabric,
    ):
        super().__init__(config=config, preprocessing=preprocessing, step=step, fabric=fabric)
        self.path = path
        self._network = network.to(fabric.device, memory_format=torch.channels_last).eval()
        self._loaded: dict[tuple[Path, str], PatchClassifier] = {}
        self._pilots: dict[tuple, np.ndarray] = {}
        self._reached: dict[tuple, torch.Tensor] = {}

    @classmethod
    def load(cls, run: str | Path, overrides: Sequence[str] = (), *, fabric: Fabric | None = None) -> "Bridge":
        """The newest checkpoint of a run folder (or a checkpoint folder itself).

        `overrides` are `key.sub=value` settings of this use, such as translate.steps=50 or train.accelerator=cpu; the
        network's architecture always comes from the checkpoint. Raises UserError for a folder without checkpoint, and
        for weights that are truncated or of another architecture.
        """
        folder = checkpoint.latest(Path(run))
        trained = checkpoint.read_config(folder)
        path, network = build_flow(trained)
        checkpoint.load_weights(folder, network)
        # The run's own file may have newer settings of translation than its last checkpoint has, and may have moved.
        if folder == Path(run):
            config = load_config(folder / checkpoint.CONFIG, overrides)
        else:
            config = load_config(Path(run) / checkpoint.CONFIG, overrides, output=Path(run))
        differing = differences(trained, config, ignore=("train", "classifier", "bridge", "data.root"))
        if differing:
            raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
        return cls(
            config=config,
            path=path,
            network=network,
            step=checkpoint.step_of(folder),
            preprocessing=Preprocessing.load(folder / checkpoint.PREPROCESSING),
            fabric=fabric or translation_fabric(config),
        )

    def _settings(self, source: str | None, target: str | None, options: dict) -> TranslateConfig:
        settings = super()._settings(source, target, options)
        trained = named_transitions(self.classes, self.config.pairs)
        if self.config.condition.target == "level":  # trained from every source to every level
            named = list(dict.fromkeys(label for pair in trained for label in pair))
            sources = list(dict.fromkeys(a for a, _ in trained))
            trained = [(a, b) for a in sources for b in named]
        reverse = settings.reverse and settings.method == "path"
        pair = (settings.target, settings.source) if reverse else (settings.source, settings.target)
        if pair not in trained:
            known = ", ".join(f"{a} -> {b}" for a, b in trained if a != b)
            raise UserError(f"the network never saw {pair[0]} -> {pair[1]}; it was trained on {known}")
        self._require_possible(settings)
        return settings

    def _require_possible(self, settings: TranslateConfig) -> None:
        """Refuse, before anything is computed, what this network or its path cannot do."""
        method, by_level = settings.method, self.config.condition.target == "level"
        if settings.reverse and method != "path":
            raise UserError(f"translate.reverse: is of method=path; for {method} exchange source and target")
        stairs.require_path(method, self.path)
        if method == "progression" and not by_level:
            raise UserError(
                "translate.method=progression: the network knows classes only, not the levels between; train with "
                "condition.target=level, or use method=path"
            )
        if method == "depth" and not by_level:
            told = named_transitions(self.classes, self.config.pairs)
            if self.config.condition.source_class:
                was_told = (settings.source, settings.source) in told
            else:
                was_told = settings.source in {target for _, target in told}
            if not was_told:
                raise UserError(
                    f"translate.method=depth: the way back is told class {settings.source!r}, which this network was "
                    "never told to reach; train with pairs.identity=true, or condition.target=level"
                )
        if method == "depth" and settings.conditions != "target" and not by_level:
            raise UserError(
                "translate.conditions: the network knows classes only; train with condition.target=level, or use "
                "conditions=target"
            )
        num = settings.levels if isinstance(settings.levels, int) else len(settings.levels)
        for key, values in (("depths", settings.depths), ("conditions", settings.conditions)):
            if isinstance(values, list) and len(values) != num:
                raise UserError(f"translate.{key}: {len(values)} values for {num} levels; give as many")
        is_adaptive = settings.spacing == "adaptive"
        if method == "progression" and (is_adaptive or settings.calibrate != "none"):
            self._guides(settings.guidance, sees="image")
        elif method == "depth" and is_adaptive:
            raise UserError("translate.spacing=adaptive: is of method=progression; give depth stairs their levels")
        if is_adaptive and not isinstance(settings.levels, int):
            raise UserError("translate.spacing=adaptive: chooses the levels itself; give their number (levels=10)")
        if settings.guidance.form != "none":
            if settings.reverse:
                raise UserError("translate.reverse: goes back unguided; set translate.guidance.form=none")
            require_form(settings.guidance.form, self.path, sees_source=self.config.condition.source_image)
            self._guides(settings.guidance, sees=_seen(settings.guidance))

    def _load_guide(self, run: Path, *, sees: str) -> PatchClassifier:
        """The guide of a run folder; UserError where it does not fit this flow."""
        if (run, sees) not in self._loaded:
            folder = checkpoint.latest(run)
            trained = checkpoint.read_config(folder)
            if trained.classifier.role != "guide":
                raise UserError(f"{run}: is a judge; a guide must be another network (classifier.role=guide)")
            compared = ["data.classes", "data.image_size", "data.crop", "data.stain", "classifier.sees"]
            if sees == "state":
                compared += ["path", "condition.source_image"]
            fitting = self.config.classifier.model_copy(update={"sees": sees})
            ours = self.config.model_copy(update={"classifier": fitting})
            problems = [
                f"{key} is {there} there, {here} here"
                for key in compared
                if (there := trained.value(key)) != (here := ours.value(key))
            ]
            if problems:
                raise UserError(f"{run}: a guide that does not fit this flow: {'; '.join(problems)}")
            self._loaded[run, sees] = classifier.load(folder, self.fabric.device)
        return self._loaded[run, sees]

    def _guides(self, guidance: GuidanceConfig, *, sees: str) -> list[PatchClassifier]:
        return [self._load_guide(run, sees=sees) for run in self._guide_runs(guidance, sees=sees)]

    def _guide_runs(self, guidance: GuidanceConfig, *, sees: str) -> list[Path]:
        """Where the guides of finished images or of states are: those that the settings name, else all of the run."""
        own = sorted(self.config.output.glob("guide_*"))
        own = [run for run in own if run.name.endswith("_state") == (sees == "state")]
        runs = (guidance.guides if sees == _seen(guidance) else []) or own
        if not runs:
            raise UserError(
                f"{self.config.output}: no trained guide here; make one with: cellflux-bridge train-classifier "
                f"{self.config.output} classifier.role=guide classifier.sees={sees}"
            )
        return runs

    def _levels(self, settings: TranslateConfig) -> tuple[float, ...]:
        if settings.method == "path":
            steps, frames, solver = settings.steps, settings.frames, settings.solver
            return morph_levels(self.path, steps=steps, frames=frames, solver=solver, reverse=settings.reverse)
        if isinstance(settings.levels, list):
            return (0.0, *settings.levels)
        if settings.spacing == "adaptive":
            return (0.0, *self._adaptive_levels(settings))
        return tuple(round(k / settings.levels, 6) for k in range(settings.levels + 1))

    def _guide_names(self, settings: TranslateConfig) -> list[str]:
        """Names and steps of the guides that a translation heeds, so that others do not complete it."""
        seen = {_seen(settings.guidance)} if settings.guidance.form != "none" else set()
        if settings.method == "progression" and (settings.calibrate != "none" or settings.spacing == "adaptive"):
            seen.add("image")
        runs = [run for sees in sorted(seen) for run in self._guide_runs(settings.guidance, sees=sees)]
        return [f"{run.name}@{checkpoint.step_of(checkpoint.latest(run))}" for run in runs]

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        digest = self.config.model_copy(update={"translate": settings}).digest()
        return TrajectoryHeader(
            method=settings.method,
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=self._levels(settings),
            config_hash="+".join([f"{digest}@{self.step}", *self._guide_names(settings)]),
        )

    def _name(self, settings: TranslateConfig) -> str:
        kind = "path_reverse" if settings.reverse else settings.method
        return f"{super()._name(settings)}_{kind}"

    def _pilot_key(self, settings: TranslateConfig) -> tuple:
        return (settings.source, settings.target, settings.solver, settings.steps, settings.guidance_scale)

    def _pilot(self, settings: TranslateConfig) -> np.ndarray:
        """Frames (G, B, C, H, W) uint8 of validation patches carried to G conditions from 0 to 1, unguided: what
        calibration and adaptive spacing are measured on."""
        key = self._pilot_key(settings)
        if key not in self._pilots:
            patches = self.patches()
            chosen = patches.sample("val", settings.source, num=_PILOT_SOURCES, seed=self.config.seed)
            if len(chosen) == 0:
                raise UserError(
                    f"translate.calibrate, spacing=adaptive: no validation patch of class {settings.source!r} to "
                    "measure on; raise data.split.val, or set calibrate=none and spacing=uniform"
                )
            x0 = image_io.encode(patches.centre(chosen)).to(self.fabric.device)
            unguided = settings.model_copy(update={"guidance": GuidanceConfig()})
            grid = torch.linspace(0, 1, _PILOT_LEVELS)
            with self.fabric.autocast():
                stair = self._progression(x0, [patches.ids[i] for i in chosen], unguided, told=grid, wanted=grid)
            self._pilots[key] = image_io.decode(stair.frames[1:]).cpu().numpy()
        return self._pilots[key]

    def _pilot_features(self, settings: TranslateConfig) -> torch.Tensor:
        """The guides' features (G, B, D) of the pilot's frames."""
        guides, frames = self._guides(settings.guidance, sees="image"), self._pilot(settings)
        features = [
            np.concatenate([self._ask(classifier.features, guide, level) for guide in guides], axis=1)
            for level in frames
        ]
        return torch.from_numpy(np.stack(features))

    def _adaptive_levels(self, settings: TranslateConfig) -> list[float]:
        """Levels whose frames lie equally far apart: the pilot's way is known by condition, so that of a level is the
        way to the condition that the network will be told for it."""
        steps = self._pilot_features(settings).diff(dim=0).norm(dim=2).mean(1)
        travelled = np.concatenate([[0.0], steps.cumsum(0).numpy()])
        grid = torch.linspace(0, 1, 10 * (_PILOT_LEVELS - 1) + 1)
        way = np.interp(self._told(settings, grid).numpy(), np.linspace(0, 1, _PILOT_LEVELS), travelled)
        chosen = stairs.equidistant_levels(grid, torch.from_numpy(np.diff(way)), settings.levels)
        levels = [round(level, 4) for level in chosen.tolist()]
        if levels[0] == 0 or any(a >= b for a, b in pairwise(levels)):
            raise UserError(
                f"translate.spacing=adaptive: the guide sees no {settings.levels} levels apart in what this network "
                "makes; set fewer levels, or spacing=uniform"
            )
        return levels

    def _told(self, settings: TranslateConfig, levels: torch.Tensor) -> torch.Tensor:
        """The conditions (K,) in [0, 1] that the network is told for levels (K,) of a progression."""
        if settings.calibrate == "none":
            return levels
        key = (settings.calibrate, *self._guide_names(settings), *self._pilot_key(settings))
        if key not in self._reached:
            self._reached[key] = self._measure_reached(settings)
        return stairs.condition_for(levels, torch.linspace(0, 1, _PILOT_LEVELS), self._reached[key])

    def _measure_reached(self, settings: TranslateConfig) -> torch.Tensor:
        """The level (G,) that the pilot's frames have at its conditions, by what `calibrate` says."""
        if settings.calibrate == "distance":
            features = self._pilot_features(settings)
            distances = (features - features[0]).norm(dim=2).mean(1)
            return distances / distances[-1].clamp_min(1e-12)
        guides, frames = self._guides(settings.guidance, sees="image"), self._pilot(settings)
        seen = np.stack([[self._ask(classifier.predict, guide, level) for guide in guides] for level in frames])
        return torch.from_numpy(seen[..., self.classes.index(settings.target)].mean((1, 2)))

    def _prepare(self, settings: TranslateConfig) -> None:
        if settings.method == "progression":
            self._told(settings, torch.ones(1))

    def _ask(self, what: Callable, guide: PatchClassifier, frames: np.ndarray) -> np.ndarray:
        return what(guide, torch.from_numpy(frames), device=self.fabric.device)

    def condition(self, x0: torch.Tensor, told: torch.Tensor, *, source: int) -> Condition:
        """The condition of source images x0 (B, 3, S, S) of a class that are to become soft labels (B, num_classes)."""
        spec = self.config.condition
        number = torch.full((len(x0),), source, dtype=torch.long, device=x0.device)
        return Condition(
            target_class=told.argmax(1) if spec.target == "class" else None,
            level=told if spec.target == "level" else None,
            source_class=number if spec.source_class else None,
            source_image=x0 if spec.source_image else None,
        )

    def _field(self, settings: TranslateConfig, *, source: int) -> stairs.Field:
        velocity = ClassifierFree(self._network, settings.guidance_scale)
        guidance = settings.guidance

        def condition(x0: torch.Tensor, told: torch.Tensor) -> Condition:
            return self.condition(x0, told, source=source)

        def guided(wanted: torch.Tensor):
            if guidance.form == "none":
                return velocity
            guides = self._guides(guidance, sees=_seen(guidance))

            def log_probabilities(x, t, x0):
                seen = (x,) if guidance.form == "endpoint" else (x, t, x0)
                return torch.stack([guide.log_probabilities(*seen) for guide in guides]).mean(0)

            return ClassifierGuided(
                velocity,
                log_probabilities,
                self.path,
                wanted,
                form=guidance.form,
                weight=guidance.weight,
                start=guidance.start,
            )

        return stairs.Field(condition, guided, velocity)

    def _labels(self, settings: TranslateConfig, levels: torch.Tensor) -> torch.Tensor:
        """Soft labels (K, num_classes) of levels (K,) between a translation's source and target."""
        source, target = self.classes.index(settings.source), self.classes.index(settings.target)
        labels = between(source, target, levels.numpy(), len(self.classes))
        return torch.from_numpy(labels).to(self.fabric.device)

    def _path(self, x0: torch.Tensor, ids: Sequence[str], settings: TranslateConfig) -> Morph:
        source = self.classes.index(settings.target if settings.reverse else settings.source)
        field = self._field(settings, source=source)
        goal = self._labels(settings, torch.tensor([0.0 if settings.reverse else 1.0])).expand(len(x0), -1)
        return morph(
            field.velocity(goal),
            self.path,
            x0,
            field.condition(x0, goal),
            noise=source_noise(x0.shape[1:], ids, seed=self.config.seed).to(x0),
            steps=settings.steps,
            frames=settings.frames,
            solver=settings.solver,
            reverse=settings.reverse,
        )

    def _progression(
        self,
        x0: torch.Tensor,
        ids: Sequence[str],
        settings: TranslateConfig,
        *,
        told: torch.Tensor,
        wanted: torch.Tensor,
    ) -> stairs.Stair:
        return stairs.progression(
            self._field(settings, source=self.classes.index(settings.source)),
            self.path,
            x0,
            told=self._labels(settings, told),
            wanted=self._labels(settings, wanted),
            noise=source_noise(x0.shape[1:], ids, seed=self.config.seed).to(x0),
            steps=settings.steps,
            solver=settings.solver,
            batch_size=settings.batch_size,
        )

    def _depth(self, x0: torch.Tensor, settings: TranslateConfig, levels: torch.Tensor) -> stairs.Stair:
        told = self._labels(settings, _rising_or(settings.conditions, levels, ones="target"))
        return stairs.depth(
            self._field(settings, source=self.classes.index(settings.source)),
            self.path,
            x0,
            source=self._labels(settings, torch.zeros(1))[0],
            depths=_rising_or(settings.depths, levels, ones="full"),
            told=told,
            wanted=told,
            steps=settings.steps,
            solver=settings.solver,
            batch_size=settings.batch_size,
        )

    def _translate_batch(self, batch: torch.Tensor, ids: Sequence[str], settings: TranslateConfig) -> Trajectory:
        x0 = image_io.encode(batch).to(self.fabric.device)
        header = self._header(settings)
        levels = torch.tensor(header.levels[1:])
        with self.fabric.autocast():
            if settings.method == "path":
                result = self._path(x0, ids, settings)
            elif settings.method == "progression":
                result = self._progression(x0, ids, settings, told=self._told(settings, levels), wanted=levels)
            else:
                result = self._depth(x0, settings, levels)
        frames = image_io.decode(result.frames).cpu().numpy()
        guidance = settings.guidance
        guides = len(self._guides(guidance, sees=_seen(guidance))) if result.gradients else 0  # each has its gradient
        cost = (result.nfe,) * len(ids), (guides * result.gradients,) * len(ids)
        return Trajectory(header, frames, linear_soft_labels(header, len(ids)), tuple(ids), *cost)


def _seen(guidance: GuidanceConfig) -> str:
    """What the guides of a form look at: finished images, or states of the path."""
    return "state" if guidance.form in ("score", "bridge") else "image"


def _rising_or(given: str | list[float], levels: torch.Tensor, ones: str) -> torch.Tensor:
    """The numbers (K,) of a depth stair that the word or list in its settings means."""
    if isinstance(given, list):
        return torch.tensor(given)
    return torch.ones_like(levels) if given == ones else levels

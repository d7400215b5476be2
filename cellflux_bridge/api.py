"""A trained bridge as a Python object: `Bridge.load("runs/lung").translate(images)`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.guides import Guides, seen_by
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config import Config, load_config, parse_overrides
from cellflux_bridge.config.registry import trusting
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.field.classifier_guided import EXACT, ClassifierGuided, pooled, require_form
from cellflux_bridge.flow.task import build_flow
from cellflux_bridge.path.base import Path as FlowPath
from cellflux_bridge.training.run import differences
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, between, linear_soft_labels
from cellflux_bridge.translation.base import Translator, translation_fabric
from cellflux_bridge.translation.level_calibration import LevelCalibration
from cellflux_bridge.translation.settings import TranslateConfig
from cellflux_bridge.transport import stairs
from cellflux_bridge.transport.path import Morph, morph, morph_levels, source_noise

# Keys of `translate` that not every method reads, and those of them whose default asks for nothing.
_READ_BY = {
    "path": ("frames",),
    "progression": ("levels", "spacing", "calibrate", "calibrate_each", "noise_resampling"),
    "depth": ("levels", "depths", "conditions"),
}
_OFF_BY_DEFAULT = ("spacing", "calibrate", "calibrate_each", "noise_resampling")


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
        given: Mapping[str, Any] | None = None,
    ):
        super().__init__(config=config, preprocessing=preprocessing, step=step, fabric=fabric, given=given)
        self.path = path
        self._network = network.to(fabric.device, memory_format=torch.channels_last).eval()
        self._weights = checkpoint.weights_digest(self._network)[:16]
        self._guides = Guides(config, fabric.device)
        self._pilot = LevelCalibration(
            config=config,
            fabric=fabric,
            weights=self._weights,
            guides=self._guides,
            patches=self.patches,
            carry=self._to_conditions,
        )

    @classmethod
    def load(
        cls, run: str | Path, overrides: Sequence[str] = (), *, fabric: Fabric | None = None, trust: bool = False
    ) -> "Bridge":
        """The newest checkpoint of a run folder (or a checkpoint folder itself).

        `overrides` are `key.sub=value` settings of this use, such as translate.steps=50 or train.accelerator=cpu; the
        network's architecture always comes from the checkpoint. With `trust`, classes of foreign modules that the run
        names are imported, which runs their code. Raises UserError for a folder without checkpoint, and for weights
        that are truncated or of another architecture.
        """
        with trusting(trust):
            return cls._load(run, overrides, fabric)

    @classmethod
    def _load(cls, run: str | Path, overrides: Sequence[str], fabric: Fabric | None) -> "Bridge":
        folder = checkpoint.latest(Path(run))
        trained = checkpoint.read_config(folder)
        path, network = build_flow(trained)
        checkpoint.load_weights(folder, network)
        # The run's own file may have newer settings of translation than its last checkpoint has, and may have moved.
        if folder == Path(run):
            config = load_config(folder / checkpoint.CONFIG, overrides)
        else:
            config = load_config(Path(run) / checkpoint.CONFIG, overrides, output=Path(run))
        differing = differences(trained, config, ignore=("train", "classifier", "ddim"))
        if differing:
            raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
        return cls(
            config=config,
            path=path,
            network=network,
            step=checkpoint.step_of(folder),
            preprocessing=Preprocessing.load(folder / checkpoint.PREPROCESSING),
            fabric=fabric or translation_fabric(config.train, section="train"),
            given=parse_overrides(overrides).get("translate"),
        )

    def _settings(self, source: str | None, target: str | None, options: Mapping[str, Any]) -> TranslateConfig:
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

    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        for key in sorted(given):
            readers = [method for method, keys in _READ_BY.items() if key in keys]
            is_off = key in _OFF_BY_DEFAULT and getattr(settings, key) == TranslateConfig.model_fields[key].default
            if readers and settings.method not in readers and not is_off:
                raise UserError(
                    f"translate.{key}: has no part in translate.method={settings.method}, which reads "
                    f"{', '.join(_READ_BY[settings.method])}; leave it out, or set method={' or '.join(readers)}"
                )
        steers = settings.guidance.form != "none"
        measures = settings.needs_pilot or settings.calibrates_each  # by guides that need not steer
        for key in given.get("guidance", {}):
            is_read = key == "form" or steers or (key == "guides" and measures)
            if not is_read and getattr(settings.guidance, key) != []:
                raise UserError(
                    f"translate.guidance.{key}: has no part in translate.guidance.form=none; leave it out, or set "
                    "form=endpoint, score, bridge or sharpen"
                )
        if settings.calibrate_each and "calibrate_each" in given and settings.calibrate == "none":
            raise UserError("translate.calibrate_each=true: set translate.calibrate=probability or distance, too")

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
            if method == "depth" and isinstance(values, list) and len(values) != num:
                raise UserError(f"translate.{key}: {len(values)} values for {num} levels; give as many")
        is_adaptive = settings.spacing == "adaptive"
        if is_adaptive and settings.calibrates_each:
            raise UserError(
                "translate.calibrate_each=true: adaptive levels are those of validation patches; set "
                "translate.calibrate_each=false, or spacing=uniform"
            )
        if settings.needs_pilot or settings.calibrates_each:
            self._guides.load(settings.guidance, sees="image")
        elif method == "depth" and is_adaptive:
            raise UserError("translate.spacing=adaptive: is of method=progression; give depth stairs their levels")
        if is_adaptive and not isinstance(settings.levels, int):
            raise UserError("translate.spacing=adaptive: chooses the levels itself; give their number (levels=10)")
        if settings.guidance.form != "none":
            if settings.reverse:
                raise UserError("translate.reverse: goes back unguided; set translate.guidance.form=none")
            condition = self.config.condition
            require_form(
                settings.guidance.form,
                self.path,
                sees_source=condition.source_image,
                dropout=condition.dropout,
                scale=settings.guidance_scale,
            )
            if settings.guidance.form in EXACT and (settings.needs_pilot or settings.calibrates_each):
                raise UserError(
                    f"translate.guidance.form={settings.guidance.form}: calls the network without a condition, so "
                    "there is none to calibrate; set translate.calibrate=none and spacing=uniform, or form=sharpen"
                )
            self._guides.load(settings.guidance, sees=seen_by(settings.guidance))

    def _levels(self, settings: TranslateConfig) -> tuple[float, ...]:
        if settings.method == "path":
            steps, frames, solver = settings.steps, settings.frames, settings.solver
            return morph_levels(self.path, steps=steps, frames=frames, solver=solver, reverse=settings.reverse)
        if isinstance(settings.levels, list):
            return (0.0, *settings.levels)
        if settings.spacing == "adaptive":
            return (0.0, *self._pilot.adaptive_levels(settings))
        return tuple(round(k / settings.levels, 6) for k in range(settings.levels + 1))

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        digest = self.config.model_copy(update={"translate": settings}).digest()
        return TrajectoryHeader(
            method=settings.method,
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=self._levels(settings),
            config_hash="+".join([f"{digest}@{self.step}:{self._weights}", *self._guides.names(settings)]),
        )

    def _name(self, settings: TranslateConfig) -> str:
        kind = "path_reverse" if settings.reverse else settings.method
        return f"{super()._name(settings)}_{kind}"

    def _prepare(self, settings: TranslateConfig) -> None:
        self._pilot.share(settings)

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
            guides = self._guides.load(guidance, sees=seen_by(guidance))

            def log_probabilities(x, t, x0):
                seen = (x,) if guidance.form == "endpoint" else (x, t, x0)
                return pooled([guide.log_probabilities(*seen) for guide in guides])

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
        """Soft labels (..., num_classes) of levels (...) between a translation's source and target."""
        source, target = self.classes.index(settings.source), self.classes.index(settings.target)
        labels = between(source, target, levels.flatten().numpy(), len(self.classes))
        return torch.from_numpy(labels).view(*levels.shape, -1).to(self.fabric.device)

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
        own: torch.Tensor | None = None,
    ) -> stairs.Stair:
        """Sources carried to levels that are told (K,), or (K, B) of each its own; `own` are their inverted states."""
        return stairs.progression(
            self._field(settings, source=self.classes.index(settings.source)),
            self.path,
            x0,
            inversion=None if own is None else stairs.Inversion(own, settings.noise_resampling * told),
            told=self._labels(settings, told),
            wanted=self._labels(settings, wanted),
            noise=source_noise(x0.shape[1:], ids, seed=self.config.seed).to(x0),
            steps=settings.steps,
            solver=settings.solver,
            batch_size=settings.batch_size,
        )

    def _inverted(self, x0: torch.Tensor, settings: TranslateConfig) -> tuple[torch.Tensor | None, int]:
        """The states that give sources x0 back, where start noise is renewed rather than random, and their forwards."""
        if settings.noise_resampling is None:
            return None, 0
        return stairs.invert(
            self._field(settings, source=self.classes.index(settings.source)),
            self.path,
            x0,
            source=self._labels(settings, torch.zeros(())),
            steps=settings.steps,
            solver=settings.solver,
            batch_size=settings.batch_size,
        )

    def _to_conditions(
        self, x0: torch.Tensor, ids: Sequence[str], settings: TranslateConfig, grid: torch.Tensor
    ) -> stairs.Stair:
        """A progression to the conditions (G,) themselves."""
        own, _ = self._inverted(x0, settings)
        return self._progression(x0, ids, settings, told=grid, wanted=grid, own=own)

    def _calibrated(
        self, x0: torch.Tensor, ids: Sequence[str], settings: TranslateConfig, levels: torch.Tensor
    ) -> stairs.Stair:
        """A progression in which the network is told what `translate.calibrate` finds for levels (K,)."""
        own, forwards = self._inverted(x0, settings)
        carry = partial(self._progression, x0, ids, own=own)
        if settings.calibrates_each:
            told, coarse = self._pilot.told_each(settings, levels, x0, carry)
            forwards += coarse
        else:
            told = self._pilot.told(settings, levels)
        found = carry(settings, told=told, wanted=levels)
        return found._replace(nfe=found.nfe + forwards)

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
                result = self._calibrated(x0, ids, settings, levels)
            else:
                result = self._depth(x0, settings, levels)
        frames = image_io.decode(result.frames).cpu().numpy()
        guidance = settings.guidance
        guides = (
            len(self._guides.load(guidance, sees=seen_by(guidance))) if result.gradients else 0
        )  # each has its gradient
        cost = (result.nfe,) * len(ids), (guides * result.gradients,) * len(ids)
        return Trajectory(header, frames, linear_soft_labels(header, len(ids)), tuple(ids), *cost)


def _rising_or(given: str | list[float], levels: torch.Tensor, ones: str) -> torch.Tensor:
    """The numbers (K,) of a depth stair that the word or list in its settings means."""
    if isinstance(given, list):
        return torch.tensor(given)
    return torch.ones_like(levels) if given == ones else levels

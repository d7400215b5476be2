"""Translation by a trained flow: a field made from its network, carried by a transport method."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.classifier.guides import Guides, seen_by
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config import Config, registry
from cellflux_bridge.data.pairs import named_transitions
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.field.classifier_free import ClassifierFree
from cellflux_bridge.field.classifier_guided import EXACT, ClassifierGuided, require_form
from cellflux_bridge.field.settings import GuidanceConfig
from cellflux_bridge.flow.network import make_condition
from cellflux_bridge.flow.shortcut import SHORTCUT, Shortcut
from cellflux_bridge.path.base import Path
from cellflux_bridge.refiner.model import REFINER, Refiner
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, between, linear_soft_labels
from cellflux_bridge.translation.base import Translator, require_finite
from cellflux_bridge.translation.inputs import Context, Sources
from cellflux_bridge.translation.level_calibration import LevelCalibration
from cellflux_bridge.translation.settings import TranslateConfig, method_keys
from cellflux_bridge.transport.base import Flow, Transport, source_noise, uniform_levels
from cellflux_bridge.velocity.base import Velocity

_NOTHING = Context()
# Values of keys that ask for nothing, so that they are no mistake beside a method that does not read them.
_OFF = (None, False, "none", "uniform")


class FlowTranslator(Translator):
    """Carries images along a trained flow by the transport method that `translate.method` names."""

    def __init__(
        self,
        *,
        config: Config,
        path: Path,
        network: Velocity,
        preprocessing: Preprocessing,
        step: int,
        fabric: Fabric,
        given: Mapping[str, Any] | None = None,
    ):
        super().__init__(config=config, preprocessing=preprocessing, step=step, fabric=fabric, given=given)
        self.path, self.codec = path, build_codec(config).to(fabric.device)
        self._network = network.to(fabric.device, memory_format=torch.channels_last).eval()
        self._weights = checkpoint.weights_digest(self._network)[:16]
        self._guides = Guides(config, fabric.device)
        has_refiner = config.refiner.scale and checkpoint.exists(config.output / REFINER)
        self._refiner = Refiner(config, fabric.device) if has_refiner else None
        shared = {"config": config, "fabric": fabric, "codec": self.codec, "guides": self._guides, "memory": {}}
        self._meter = partial(LevelCalibration, **shared, patches=self.patches)

    def _settings(self, source: str | None, target: str | None, options: Mapping[str, Any]) -> TranslateConfig:
        settings = super()._settings(source, target, options)
        trained = self._trained()
        pair = (settings.source, settings.target)[:: -1 if _method(settings).reverse else 1]
        if pair not in trained:
            known = ", ".join(f"{a} -> {b}" for a, b in trained if a != b)
            raise UserError(f"the network never saw {pair[0]} -> {pair[1]}; it was trained on {known}")
        self._require_possible(settings, options)
        return settings.own()

    def _require_condition(self, settings: TranslateConfig) -> None:
        """UserError for a target or a dose that this network was never told."""
        condition, unseen = self.config.condition, self.config.data.split.unseen
        if settings.target in unseen and not self.can_make(settings.target):
            raise UserError(
                f"translate.target: no training saw {settings.target!r} (data.split.unseen), and this network is not "
                "conditioned on vectors of classes; train with a part `embedding` in condition.parts"
            )
        if settings.dose is not None and not condition.has("dose"):
            raise UserError(
                f"translate.dose={settings.dose}: this network is not conditioned on a dose; leave it out, or train "
                "with a part `dose` in condition.parts"
            )

    @property
    def _by_level(self) -> bool:
        return self.config.condition.target == "level"

    def _trained(self) -> list[tuple[str, str]]:
        """The transitions that the network learned; by level, from every source to every level."""
        trained = named_transitions(self.classes, self.config.pairs)
        if not self._by_level:
            return trained
        named = dict.fromkeys(label for pair in trained for label in pair)
        return [(a, b) for a in dict.fromkeys(a for a, _ in trained) for b in named]

    def _require_read(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        own = settings.of(settings.method)
        for key in sorted(set(given) - set(own) - set(TranslateConfig.model_fields)):
            readers = [name for name in registry.names("transport") if key in method_keys(name)]
            is_off = any(settings.model_extra[key] is off for off in _OFF if method_keys(readers[0])[key] == off)
            if not is_off:
                raise UserError(
                    f"translate.{key}: has no part in translate.method={settings.method}, which reads "
                    f"{', '.join(own)}; leave it out, or set method={' or '.join(readers)}"
                )
        steers, measures = settings.guidance.form != "none", _method(settings).is_calibrated
        for key in given.get("guidance", {}):
            is_read = key == "form" or steers or (key == "guides" and measures)  # guides that measure need not steer
            if not is_read and getattr(settings.guidance, key) != []:
                raise UserError(
                    f"translate.guidance.{key}: has no part in translate.guidance.form=none; leave it out, or set "
                    "form=endpoint, score, bridge or sharpen"
                )

    def _require_possible(self, settings: TranslateConfig, given: Mapping[str, Any]) -> None:
        """Refuse, before anything is computed, what this network or its path cannot do."""
        method, flow, _ = self._use(settings)
        if settings.refine and self._refiner is None and (self.config.refiner.scale or "refine" in given):
            raise UserError(
                f"translate.refine: {self.config.output} has no trained refiner. Train it: cellflux-bridge train "
                f"{self.config.output} refiner.scale={self.config.refiner.scale or 0.2}. Or set translate.refine=false"
            )
        guidance, scale, condition = settings.guidance, settings.guidance_scale, self.config.condition
        self._require_condition(settings)
        if settings.of(settings.method).get("solver") == "shortcut":
            self._require_shortcuts(settings, method)
        method.require(flow, given=given)
        if method.is_calibrated and (condition.has("batch") or settings.dose is not None):
            raise UserError(
                "translate.calibrate, spacing=adaptive: are measured on validation patches, whose batches and doses "
                "differ; set calibrate=none and spacing=uniform for a network that is conditioned on them"
            )
        if method.is_calibrated:
            self._guides.load(guidance, sees="image")
        if guidance.form == "none":
            return
        sees_source, dropout = condition.source_image, condition.dropout
        require_form(guidance.form, self.path, sees_source=sees_source, dropout=dropout, scale=scale)
        if guidance.form in EXACT and method.is_calibrated:
            raise UserError(
                f"translate.guidance.form={guidance.form}: calls the network without a condition, so there is none to "
                "calibrate; set translate.calibrate=none and translate.spacing=uniform, or form=sharpen"
            )
        self._guides.load(guidance, sees=seen_by(guidance))

    def _require_shortcuts(self, settings: TranslateConfig, method: Transport) -> None:
        problem, steps = None, settings.of(settings.method)["steps"]
        if not method.takes_shortcuts:
            problem = f"has no part in translate.method={settings.method}"
        elif (found := self._shortcut(settings)) is None:
            run, most = self.config.output, self.config.shortcut.steps or 4
            problem = f"{run} has no trained shortcuts. Train them: cellflux-bridge train {run} shortcut.steps={most}"
        elif settings.guidance.form != "none" or settings.guidance_scale != 1:
            problem = "guidance needs the velocity at one moment; set translate.guidance.form=none and guidance_scale=1"
        elif steps not in (allowed := [2**k for k in range(found.steps.bit_length())]):
            problem = f"takes {', '.join(map(str, allowed))} steps here (shortcut.steps), found translate.steps={steps}"
        if problem:
            raise UserError(f"translate.solver=shortcut: {problem}. Or set another solver")

    def _header(self, settings: TranslateConfig) -> TrajectoryHeader:
        digest = self.config.model_copy(update={"translate": settings}).digest()
        method, flow, meter = self._use(settings)
        others = self._guides.names(settings.guidance, measure=method.is_calibrated)
        others += self._companions(settings)
        return TrajectoryHeader(
            method=settings.method,
            source=settings.source,
            target=settings.target,
            classes=self.classes,
            levels=method.levels(flow, meter),
            config_hash="+".join([f"{digest}@{self.step}:{self._weights}", *others]),
        )

    def _name(self, settings: TranslateConfig) -> str:
        return f"{super()._name(settings)}_{_method(settings).suffix}"

    def _prepare(self, settings: TranslateConfig) -> None:
        method, *use = self._use(settings)
        method.prepare(*use)

    def _use(self, settings: TranslateConfig, context: Context = _NOTHING) -> tuple[Transport, Flow, LevelCalibration]:
        """The method of a translation, and the flow and the meter that it uses."""
        method = _method(settings)
        source = settings.target if method.reverse else settings.source
        trained = self._trained()
        knows_source = self.config.condition.source_class and not self._by_level
        plain = ClassifierFree(self._network, settings.guidance_scale)
        flow = Flow(
            path=self.path,
            by_level=self._by_level or self._between_classes(settings),
            reaches_source=(source, source) in trained if knows_source else source in {b for _, b in trained},
            is_guided=settings.guidance.form != "none",
            batch_size=settings.batch_size,
            labels=partial(self._labels, settings),
            condition=partial(self._condition, settings, self.classes.index(source), context),
            plain=plain,
            field=partial(self._guided, settings.guidance, plain),
            shortcut=self._shortcut(settings),
        )
        return (
            method,
            flow,
            self._meter(settings=settings, weights="+".join([self._weights, *self._shortcut_name(settings)])),
        )

    @cached_property
    def _trained_shortcut(self) -> Shortcut | None:
        is_there = self.config.shortcut.steps and checkpoint.exists(self.config.output / SHORTCUT)
        return Shortcut(self.config, self._weights, self.fabric.device) if is_there else None

    def _shortcut(self, settings: TranslateConfig) -> Shortcut | None:
        """The run's shortcuts, where a translation takes them."""
        return self._trained_shortcut if settings.of(settings.method).get("solver") == "shortcut" else None

    def _shortcut_name(self, settings: TranslateConfig) -> list[str]:
        return [found.name] if (found := self._shortcut(settings)) else []

    def _companions(self, settings: TranslateConfig) -> list[str]:
        """The names of what a translation uses beside its flow and its guides."""
        return [*self._shortcut_name(settings), *([self._refiner.name] if settings.refine and self._refiner else [])]

    def _between_classes(self, settings: TranslateConfig) -> bool:
        """Whether levels between two classes mean something to a network that was trained on classes alone: as doses,
        or as vectors between theirs."""
        condition = self.config.condition
        return isinstance(settings.dose, tuple) or (condition.target == "none" and condition.has("embedding"))

    def _condition(
        self,
        settings: TranslateConfig,
        source: int,
        context: Context,
        x0: torch.Tensor,
        labels: torch.Tensor,
        of: torch.Tensor,
    ) -> Condition:
        """The condition of states x0 (R, C, H, W) of sources `of` (R,), which are to become soft labels."""
        target = self.classes.index(settings.target)
        share, dose = labels[:, target], None
        if context.targets is not None:
            labels = labels.clone()
            labels[:, target] = 0
            labels.scatter_add_(1, context.targets.to(x0.device)[of][:, None], share[:, None])
        if context.doses is not None:
            dose = context.doses.to(x0)[of]
        elif isinstance(settings.dose, tuple):  # levels are doses, all of the target, from the first level on
            (first, last), lowest = settings.dose, self._first_level(settings)
            way = ((share - lowest) / (1 - lowest)).clamp(0, 1) if lowest < 1 else torch.ones_like(share)
            dose, whole = first * (last / first) ** way, torch.zeros_like(labels)
            whole[:, target] = 1
            labels = torch.where(share[:, None] > 0, whole, labels)
        elif settings.dose is not None:
            dose = torch.full_like(share, settings.dose)
        return make_condition(
            self._network.spec,
            x0=x0,
            target_label=labels,
            source_class=source,
            batch=None if context.batches is None else context.batches.to(x0.device)[of],
            dose=None if dose is None else torch.where(share > 0, dose, 0),
        )

    def _first_level(self, settings: TranslateConfig) -> float:
        return uniform_levels(settings.of(settings.method).get("levels", 1))[1]

    def _labels(self, settings: TranslateConfig, levels: torch.Tensor) -> torch.Tensor:
        """Soft labels (..., num_classes) of levels (...) between a translation's source and target."""
        source, target = self.classes.index(settings.source), self.classes.index(settings.target)
        labels = between(source, target, levels.flatten().numpy(), len(self.classes))
        return torch.from_numpy(labels).view(*levels.shape, -1).to(self.fabric.device)

    def _guided(self, guidance: GuidanceConfig, plain: Callable, labels: torch.Tensor) -> Callable:
        """The velocity steered toward soft labels (R, num_classes)."""
        if guidance.form == "none":
            return plain
        sees = seen_by(guidance)
        guides = [guide.log_probabilities for guide in self._guides.load(guidance, sees=sees)]
        if sees == "image":
            guides = [lambda x, guide=guide: guide(self.codec.decode(x)) for guide in guides]
        how = {"form": guidance.form, "weight": guidance.weight, "start": guidance.start}
        return ClassifierGuided(plain, guides, self.path, labels, **how)

    def can_make(self, label: str) -> bool:
        """Whether the network can be asked for a class: it saw it as a target, or knows its vector."""
        is_known = label not in self.config.data.split.unseen or self.config.condition.has("embedding")
        return is_known and label in {target for _, target in self._trained()}

    def identity(self) -> str:
        """A short text that differs where translations would: of other settings, another step or other weights."""
        return "+".join(
            [f"{self.config.digest()}@{self.step}:{self._weights}", *self._companions(self.config.translate)]
        )

    def last_frames(self, sources: Sources, *, source: str) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """What sources become at level 1 alone, each of its own target: batch by batch their numbers, and frames (B, C,
        S, S) uint8. They come in the order of their targets, of which a batch may hold several; where a guide or a
        calibration is of one target, it holds one."""
        own = method_keys(self.config.translate.method, None)
        only_last = {key: value for key, value in (("levels", 1), ("frames", 2)) if key in own}
        targets, starts = np.unique(np.sort(sources.targets), return_index=True)
        settings = [self._settings(source, self.classes[target], only_last) for target in targets]
        order = np.argsort(sources.targets, kind="stable")
        are_apart = settings[0].guidance.form != "none" or _method(settings[0]).is_calibrated
        for of, rows in zip(settings, np.split(order, starts[1:]) if are_apart else [order], strict=are_apart):
            name = f"{source} -> " + (of.target if are_apart or len(targets) == 1 else f"{len(targets)} classes")
            for part, made in self._batches(sources, rows.tolist(), of, batch_name=name):
                yield part, made.frames[-1]

    def _translate_batch(self, batch, ids, settings, context) -> Trajectory:
        x0 = self.codec.encode(batch.to(self.fabric.device))
        header, (method, flow, meter) = self._header(settings), self._use(settings, context)
        noise = source_noise(x0.shape[1:], ids, seed=self.config.seed).to(x0)
        with self.fabric.autocast():
            result = method.carry(flow, x0, noise=noise, levels=torch.tensor(header.levels[1:]), meter=meter)
        require_finite(result.frames, ids)
        made = self.codec.to_uint8(result.frames[1:])
        if settings.refine and self._refiner:
            made = self._refined(made, header.levels[1:], ids, batch_size=settings.batch_size)
            result = result._replace(nfe=result.nfe + sum(map(self._refiner.forwards, header.levels[1:])))
        # The source itself comes first, also where a codec loses something.
        frames = torch.cat([batch[None].cpu(), made.cpu()]).numpy()
        cost = (result.nfe,) * len(ids), (result.gradients,) * len(ids)
        depths = None if result.depths is None else np.tile(result.depths.numpy()[:, None], len(ids))
        return Trajectory(header, frames, linear_soft_labels(header, len(ids)), tuple(ids), *cost, depths)

    def _refined(
        self, frames: torch.Tensor, levels: Sequence[float], ids: Sequence[str], *, batch_size: int
    ) -> torch.Tensor:
        """Frames (K, B, C, H, W) uint8 of levels (K,) with new finest detail. All levels of a source get the same
        noise, so that what is drawn anew stays where it is along a sequence."""
        noise = source_noise(frames.shape[2:], ids, seed=derive_seed(self.config.seed, "refiner")).to(frames.device)

        def refined(made: torch.Tensor, level: float) -> torch.Tensor:
            parts = zip(made.split(batch_size), noise.split(batch_size), strict=True)
            return torch.cat([self._refiner(x, of, level=level) for x, of in parts])

        with self.fabric.autocast():
            return torch.stack([refined(*of) for of in zip(frames, levels, strict=True)])


def _method(settings: TranslateConfig) -> Transport:
    return registry.build("transport", {**settings.of(settings.method), "name": settings.method})

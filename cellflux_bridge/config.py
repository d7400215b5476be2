"""One typed schema of a run: defaults, then the YAML file, then key.sub=value from the command line.

Every section is a pydantic model that refuses unknown keys. Components (layout, coupling, path, velocity) are
mappings with a `name`; their keys are the constructor's keyword arguments (see `registry`). A loaded `Config` is
complete: every default is filled in, so that the copy saved beside a result says all that it was made with.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from cellflux_bridge.errors import UserError
from cellflux_bridge.registry import validate as validate_component
from cellflux_bridge.schema import Keys, dump_yaml, explain, parse_yaml, read_yaml


def _component(kind: str, key: str, *, default: str) -> Any:
    def complete(spec: Any) -> dict[str, Any]:
        spec = {"name": default, **spec} if isinstance(spec, dict) else spec
        return validate_component(kind, spec, key=key)

    return Annotated[dict[str, Any], BeforeValidator(complete), Field(default_factory=dict)]


Layout = _component("layout", "data.layout", default="folder")
Coupling = _component("coupling", "coupling", default="minibatch_ot")
Path_ = _component("path", "path", default="noised_source")
Velocity = _component("velocity", "velocity", default="unet")
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(Keys):
    model_config = ConfigDict(validate_default=True, frozen=True)


class StainConfig(Section):
    """What is done about stain: nothing, every image normalised, or jitter in optical density while training."""

    mode: Literal["none", "normalise", "augment"] = "none"
    method: Literal["reinhard", "macenko"] = "reinhard"
    strength: Annotated[float, Field(gt=0, le=1)] = 0.1


class SplitConfig(Section):
    """Fractions of groups for a validation or test split that the data does not name.

    They are taken from the patches that would train, named so or not; 0 takes none and leaves that split empty.
    """

    val: Fraction = 0.1
    test: Fraction = 0.2

    @model_validator(mode="after")
    def _leaves_training_data(self):
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must stay below 1 so that training keeps some, found {self.val + self.test}")
        return self


class DataConfig(Section):
    root: Path
    layout: Layout
    classes: list[str] | None = None
    image_size: Annotated[int, Field(ge=8)] = 64
    crop: Count | None = None
    flips: bool = True
    stain: StainConfig = StainConfig()
    split: SplitConfig = SplitConfig()
    cache_dir: Path = Path("~/.cache/cellflux_bridge")
    workers: Annotated[int, Field(ge=0)] = 0

    @field_validator("classes")
    @classmethod
    def _differ(cls, classes):
        repeated = [label for label in classes or () if classes.count(label) > 1]
        if repeated:
            raise ValueError(f"class {repeated[0]!r} stands twice")
        return classes


class PairsConfig(Section):
    transitions: Literal["all"] | list[tuple[str, str]] = "all"
    identity: bool = False
    self_pairs: Fraction = 0.0  # by level: how often a source that has the target's level already is its own target
    match_group: bool = False
    pool: Count = 1  # batches whose pairs are chosen together


class ConditionConfig(Section):
    """What the velocity network is told beside the time and the state."""

    target: Literal["class", "level"] = "class"
    # What the level of a training image is, where target is "level": its score in the data, the probabilities that
    # classifiers give it which were not trained on its group (cross-fitting), or its class alone.
    level: Literal["score", "crossfit", "class"] = "class"
    level_bins: Count = 4
    source_class: bool = True
    source_image: bool = False
    dropout: Fraction = 0.1


class TrainConfig(Section):
    steps: Count = 10_000
    batch_size: Count = 64
    accumulate: Count = 1
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    gradient_clip: NonNegative = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    max_cpu_minutes: Annotated[float, Field(gt=0)] | None = None  # summed over a process's threads
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 1
    log_every: Count = 20
    validate_every: Count = 500
    validate_pairs: Count = 256
    sample_every: Annotated[int, Field(ge=0)] = 1000
    tensorboard: bool = False
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


# A section with other defaults is a type of its own, so that one key that is set leaves the others at these defaults.
class ClassifierTrainConfig(TrainConfig):
    """The training of a classifier: shorter than that of a flow, and without sheets of samples."""

    steps: Count = 1500
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Count = 250
    sample_every: Annotated[int, Field(ge=0)] = 0


class DenoiserTrainConfig(TrainConfig):
    """The training of the reference bridge's denoiser: without sheets of samples."""

    sample_every: Annotated[int, Field(ge=0)] = 0


class ClassifierConfig(Section):
    """A classifier of patches: `small` (a built-in for small patches) or any timm model name, and what it looks at."""

    backbone: str = "small"
    pretrained: bool = False
    role: Literal["judge", "guide"] = "judge"
    sees: Literal["image", "state"] = "image"  # state: x_t of the flow's path at a time t (guides only)
    view: Literal["rgb", "grey"] = "rgb"
    labels: Literal["class", "score"] = "class"  # score: soft labels from the data's scores
    jitter: Fraction = 0.0  # of contrast and brightness; this and blur (px) are for images, states are seen as they are
    blur: NonNegative = 0.0
    # mixup of images and labels, Beta(mixup, mixup); 0: none. 1 makes the probability nearly linear between the classes
    mixup: NonNegative = 0.0
    seed: int = 0  # of this training alone: the run's own seed also decides the splits
    folds: Annotated[int, Field(ge=2)] = 3  # of the cross-fitting that condition.level asks for
    train: ClassifierTrainConfig = ClassifierTrainConfig()

    @model_validator(mode="after")
    def _only_guides_see_states(self):
        if self.sees == "state" and self.role == "judge":
            raise ValueError("sees=state is for guides: set role=guide (a judge looks at finished images)")
        if self.sees == "state" and self.view != "rgb":
            raise ValueError(f"sees=state with view={self.view}: the flow's states are seen in RGB; set view=rgb")
        if self.sees == "state" and self.mixup:
            raise ValueError(f"sees=state with mixup={self.mixup}: is of finished images; set mixup=0")
        return self


class GuidanceConfig(Section):
    """Classifier-gradient guidance of a flow: see `guidance.classifier` for the forms."""

    form: Literal["none", "endpoint", "score", "bridge"] = "none"
    weight: NonNegative = 1.0
    start: Annotated[float, Field(gt=0, lt=1)] = 0.05  # score and bridge: bounded there; endpoint: off before
    # run folders of guides, whose opinions are pooled; empty: all guides of the flow's own run
    guides: list[Path] = Field(default=[])


Levels = Annotated[list[Fraction], Field(min_length=1)]


class TranslateConfig(Section):
    source: str | None = None
    target: str | None = None
    split: Literal["train", "val", "test"] = "test"
    num: Count | None = 64
    method: Literal["path", "progression", "depth"] = "path"
    solver: Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"] = "midpoint"
    steps: Count = 25
    frames: Annotated[int, Field(ge=2)] = 11  # of the path method
    levels: Count | Levels = 10  # of the stairs: how many after the source, or which
    spacing: Literal["uniform", "adaptive"] = "uniform"
    # progression: what the network is told for a level: the level itself, or the condition at which, on validation
    # patches, the guide's mean probability of the target is the level, or that share of the way in its features is made
    calibrate: Literal["none", "probability", "distance"] = "none"
    # on each source by itself, by a coarse stair of its own, instead of on validation patches
    calibrate_each: bool = False
    # progression: null starts every level from the same random noise; a number from that which gives back the source,
    # and which level 1 has exchanged for random noise in this share (0: not at all, 1: wholly)
    renewal: Fraction | None = None
    depths: Literal["rising", "full"] | Levels = "rising"  # depth stairs: how far back each level starts
    conditions: Literal["target", "rising"] | Levels = "target"  # depth stairs: the level that each is told
    guidance_scale: NonNegative = 1.0
    guidance: GuidanceConfig = GuidanceConfig()
    reverse: bool = False
    batch_size: Count = 64  # images that go through the network at once

    @property
    def needs_pilot(self) -> bool:
        """Whether levels, or what the network is told for them, are measured before anything is translated."""
        measured = self.calibrate != "none" and not self.calibrates_each
        return self.method == "progression" and (measured or self.spacing == "adaptive")

    @property
    def calibrates_each(self) -> bool:
        """Whether what the network is told is measured on each source by itself."""
        return self.method == "progression" and self.calibrate != "none" and self.calibrate_each

    @field_validator("levels")
    @classmethod
    def _end_at_the_target(cls, levels):
        if isinstance(levels, list) and levels[-1] != 1:
            raise ValueError(f"the last level must be 1, the target, found {levels[-1]}")
        return levels

    @field_validator("levels", "depths", "conditions")
    @classmethod
    def _rising(cls, values, info):
        if isinstance(values, list):
            may_repeat = info.field_name != "levels"  # one dial may stand still while the other one turns
            if values != sorted(values if may_repeat else set(values)) or values[0] == 0:
                how = "never fall" if may_repeat else "rise strictly"
                raise ValueError(f"these must {how}, from above 0 to at most 1 (0 is the source itself)")
        return values


class ADMConfig(Section):
    """Size of an ADM network (Dhariwal & Nichol 2021); `attention` names the sides, in px, of the maps that attend."""

    channels: Annotated[int, Field(ge=32, multiple_of=32)] = 32
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 4)
    blocks: Count = 1
    attention: tuple[Count, ...] = (8,)
    head_channels: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    new_attention_order: bool = False
    weights: Path | None = None  # a guided-diffusion or Cellflow .pt file, used instead of a training
    train: DenoiserTrainConfig = DenoiserTrainConfig()

    @model_validator(mode="after")
    def _attention_order_is_stated(self):
        if self.weights is not None and "new_attention_order" not in self.model_fields_set:
            raise ValueError(
                "weights need new_attention_order stated beside them (false for guided-diffusion's releases): a wrong "
                "one loads without an error and gives wrong images"
            )
        return self


class NoisyClassifierConfig(ADMConfig):
    """Size and training of the reference bridge's classifier of noised images."""

    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2)
    train: ClassifierTrainConfig = ClassifierTrainConfig()


class BridgeConfig(Section):
    """The reference: Cellflow's classifier-guided DDIM bridge (`bridge/`)."""

    learn_sigma: bool = False
    denoiser: ADMConfig = ADMConfig()
    source_denoiser: ADMConfig | None = None  # weights of a network that encodes; null: the denoiser does
    classifier: NoisyClassifierConfig = NoisyClassifierConfig()
    timesteps: Annotated[int, Field(ge=2, le=1000)] = 100  # of the respaced schedule
    depths: Literal["uniform", "fourier", "fourier_unmirrored"] | list[Annotated[int, Field(ge=1)]] = "uniform"
    guidance: Literal["classifier", "classifier_free", "none"] = "classifier"
    scale: NonNegative = 2.0  # of the classifier's gradient
    weight: NonNegative = 1.8  # of classifier-free guidance, on both ways; see `bridge.ddim.ClassifierFree`
    class_dropout: Fraction = 0.1  # of the denoiser's training for classifier-free guidance

    @model_validator(mode="after")
    def _source_denoiser_has_weights(self):
        if self.source_denoiser is not None and self.source_denoiser.weights is None:
            raise ValueError("source_denoiser needs weights: only one denoiser is trained here")
        return self


class VideoConfig(Section):
    formats: list[Literal["mp4", "webp", "gif", "strip"]] = Field(default=["mp4", "webp", "strip"])
    sequences: Count = 12
    columns: Count | None = None
    fps: Annotated[float, Field(gt=0, le=60)] = 10.0
    hold: NonNegative = 0.8
    ping_pong: bool = True
    tile: Count = 128
    caption: bool = True
    show_source: bool = True


# What may differ between the parts of one run: where things are, how long and how often, on which devices.
_PACE = (
    "steps",
    "max_minutes",
    "max_cpu_minutes",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "validate_every",
    "sample_every",
    "tensorboard",
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
)
_TRAININGS = ("train", "classifier.train", "bridge.denoiser.train", "bridge.classifier.train")
PLACES_AND_PACE = (
    *("name", "output", "data.root", "data.cache_dir", "data.workers"),
    *(f"{section}.{key}" for section in _TRAININGS for key in _PACE),
    # Of classifier.train they are more than a figure in the log: a guide of states has its temperatures from them.
    *(f"{section}.validate_pairs" for section in _TRAININGS if section != "classifier.train"),
)


class Config(Section):
    name: str
    seed: int = 0
    output: Path
    data: DataConfig
    pairs: PairsConfig = PairsConfig()
    coupling: Coupling
    path: Path_
    condition: ConditionConfig = ConditionConfig()
    velocity: Velocity
    train: TrainConfig = TrainConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    bridge: BridgeConfig = BridgeConfig()
    translate: TranslateConfig = TranslateConfig()
    video: VideoConfig = VideoConfig()

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `load_config` reads back to an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))

    def digest(self) -> str:
        """A short hash of what sequences are made with: not where, how fast or how many, nor how they are shown."""
        left_out = (*PLACES_AND_PACE, "video", "classifier", "bridge", "translate.num", "translate.batch_size")
        canonical = json.dumps(self.flat(without=left_out), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def value(self, key: str) -> Any:
        """What stands at a dotted key, as in the YAML text; a section is a mapping. UserError where nothing does."""
        found = self.model_dump(mode="json")
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                raise UserError(f"{key}: no such key; `cellflux-bridge config show` prints all")
            found = found[part]
        return found

    def flat(self, *, without: Sequence[str]) -> dict[str, Any]:
        """Every value by its dotted key, less the keys and sections named in `without`."""

        def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
            if key in without:
                return
            if isinstance(value, dict):
                for name, item in value.items():
                    yield from walk(item, f"{key}.{name}" if key else name)
            else:
                yield key, value

        return dict(walk(self.model_dump(mode="json"), ""))


def merged(base: Any, over: Any, *, nested: bool = False) -> Any:
    """`base` with what `over` says otherwise, key by key at every depth."""
    if not isinstance(over, dict):
        return over
    if isinstance(base, str) and nested:
        base = {"name": base}
    if not isinstance(base, dict):
        return over
    if nested and "name" in base and over.get("name", base["name"]) != base["name"]:
        return over  # another component: the old one's arguments do not apply to it
    return {**base, **{key: merged(base.get(key), value, nested=True) for key, value in over.items()}}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested mapping that `key.sub=value` arguments describe; values are YAML."""
    together: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"{text!r}: expected key=value or key.sub=value, as in train.steps=2000")
        nested = parse_yaml(value, origin=f"command line, {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        together = merged(together, nested)
    return together


def load_config(path: Path | str, overrides: Sequence[str] = (), *, output: Path | None = None) -> Config:
    """The complete configuration of a YAML file with `key.sub=value` overrides.

    `name` defaults to the file's own name and `output` to `runs/<name>`; the argument `output`, where a run was found,
    replaces what its file says. Raises UserError that lists every unknown
    key (with the nearest valid one) and every wrong value.
    """
    path = Path(path)
    data = read_yaml(path) | ({} if output is None else {"output": output})
    data = merged(data, parse_overrides(overrides))
    data.setdefault("name", path.stem)
    data.setdefault("output", f"runs/{data['name']}")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(f"{path}{given}:\n{explain(error, Config)}") from error

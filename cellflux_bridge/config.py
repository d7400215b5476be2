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
    """Fractions of groups for validation and test where the data names no splits."""

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
    match_group: bool = False


class ConditionConfig(Section):
    """What the velocity network is told beside the time and the state."""

    target: Literal["class", "level"] = "class"
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


class ClassifierConfig(Section):
    """A classifier of patches: `small` (a built-in for small patches) or any timm model name, and what it looks at."""

    backbone: str = "small"
    pretrained: bool = False
    view: Literal["rgb", "grey"] = "rgb"
    jitter: Fraction = 0.0
    blur: NonNegative = 0.0
    train: TrainConfig = TrainConfig(
        steps=1500, lr=1e-3, weight_decay=1e-2, ema_decay=0.99, warmup_steps=100, validate_every=250, sample_every=0
    )


class TranslateConfig(Section):
    source: str | None = None
    target: str | None = None
    split: Literal["train", "val", "test"] = "test"
    num: Count | None = 64
    solver: Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"] = "midpoint"
    steps: Count = 25
    frames: Annotated[int, Field(ge=2)] = 11
    guidance_scale: NonNegative = 1.0
    reverse: bool = False
    batch_size: Count = 64


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
PLACES_AND_PACE = (
    *("name", "output", "data.cache_dir", "data.workers"),
    *(f"{section}.{key}" for section in ("train", "classifier.train") for key in _PACE),
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
    translate: TranslateConfig = TranslateConfig()
    video: VideoConfig = VideoConfig()

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `load_config` reads back to an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))

    def digest(self) -> str:
        """A short hash of what sequences are made with: not where, how fast or how many, nor how they are shown."""
        left_out = (*PLACES_AND_PACE, "video", "classifier", "translate.num", "translate.batch_size")
        canonical = json.dumps(self.flat(without=left_out), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

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


def _merge(base: Any, over: Any, *, nested: bool = False) -> Any:
    if not isinstance(over, dict):
        return over
    if isinstance(base, str) and nested:
        base = {"name": base}
    if not isinstance(base, dict):
        return over
    if nested and "name" in base and over.get("name", base["name"]) != base["name"]:
        return over  # another component: the old one's arguments do not apply to it
    return {**base, **{key: _merge(base.get(key), value, nested=True) for key, value in over.items()}}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested mapping that `key.sub=value` arguments describe; values are YAML."""
    merged: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"{text!r}: expected key=value or key.sub=value, as in train.steps=2000")
        nested = parse_yaml(value, origin=f"command line, {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested)
    return merged


def load_config(path: Path | str, overrides: Sequence[str] = (), *, output: Path | None = None) -> Config:
    """The complete configuration of a YAML file with `key.sub=value` overrides.

    `name` defaults to the file's own name and `output` to `runs/<name>`; the argument `output`, where a run was found,
    replaces what its file says. Raises UserError that lists every unknown
    key (with the nearest valid one) and every wrong value.
    """
    path = Path(path)
    data = read_yaml(path) | ({} if output is None else {"output": output})
    data = _merge(data, parse_overrides(overrides))
    data.setdefault("name", path.stem)
    data.setdefault("output", f"runs/{data['name']}")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        given = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(f"{path}{given}:\n{explain(error, Config)}") from error

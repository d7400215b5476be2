"""Judges and guides."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cellflux_bridge.config.registry import require_trusted
from cellflux_bridge.config.schema import Count, Fraction, NonNegative, Section, Seed
from cellflux_bridge.training.settings import TrainConfig


# A section with other defaults is a type of its own, so that one key that is set leaves the others at these defaults.
class ClassifierTrainConfig(TrainConfig):
    """The training of a classifier: shorter than that of a flow, and without sheets of samples."""

    steps: Count = 1500
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    weight_decay: NonNegative = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Count = 250
    sample_every: Annotated[int, Field(ge=0)] = 0


class ClassifierConfig(Section):
    """A classifier of patches: `small` (a built-in for small patches), `fast` (the same at a quarter of the cost) or
    any timm model name, and what it looks at."""

    backbone: str = "small"
    pretrained: bool = False
    role: Literal["judge", "guide"] = "judge"
    sees: Literal["image", "state"] = "image"  # state: x_t of the flow's path at a time t (guides only)
    view: Literal["rgb", "grey"] = "rgb"
    labels: Literal["class", "score"] = "class"  # score: soft labels from the data's scores
    jitter: Fraction = 0.0  # of contrast and brightness; this and blur (px) are for images, states are seen as they are
    blur: Annotated[float, Field(ge=0, le=100)] = 0.0
    # mixup of images and labels, Beta(mixup, mixup); 0: none. 1 makes the probability nearly linear between the classes
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    seed: Seed = 0  # of this training alone: the run's own seed also decides the splits
    folds: Annotated[int, Field(ge=2, le=1000)] = 3  # of the cross-fitting that condition.level asks for
    train: ClassifierTrainConfig = ClassifierTrainConfig()

    @field_validator("backbone")
    @classmethod
    def _comes_from_the_hub_for_the_user_alone(cls, backbone):
        if ":" in backbone:  # timm asks the hub, or a folder, even where it loads no weights of it
            require_trusted(backbone, key="classifier.backbone", what="fetched from elsewhere", not_done="fetched")
        return backbone

    @model_validator(mode="after")
    def _only_guides_see_states(self):
        for key, needed in {"role": "guide", "view": "rgb", "mixup": 0}.items():
            if self.sees == "state" and getattr(self, key) != needed:
                raise ValueError(
                    f"sees=state is for guides, which see states in colour and unmixed: set {key}={needed}"
                )
        return self

"""How long, how fast and on what a network is trained."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cellflux_bridge.config.schema import Count, Few, NonNegative, Section

_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    steps: Count = 10_000
    batch_size: Few = 64
    accumulate: Few = 1
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-4
    betas: tuple[_Beta, _Beta] = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    lr_decay: Literal["none", "linear"] = "none"  # linear: to 0 at train.steps, whatever minutes say
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    gradient_clip: NonNegative = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    max_cpu_minutes: Annotated[float, Field(gt=0)] | None = None  # summed over a process's threads
    init_from: Path | None = None  # a run of the same network, whose averaged weights this training begins with
    resume: Literal["auto", "never"] = "auto"
    checkpoint_every: Count = 500
    keep_checkpoints: Few = 1
    log_every: Count = 20
    validate_every: Count = 500
    validate_pairs: Few = 256
    sample_every: Annotated[int, Field(ge=0)] = 1000
    tensorboard: bool = False
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: Few = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class CompanionTrainConfig(TrainConfig):
    """The training of what a run has beside its flow: shorter, on the flow's devices, and without sheets of samples."""

    batch_size: Few = 32
    lr_decay: Literal["none", "linear"] = "linear"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Count = 200
    sample_every: Annotated[int, Field(ge=0)] = 0

    @field_validator("accelerator", "devices", "num_nodes", "strategy", "precision")
    def _is_that_of_the_flow(cls, value, info):
        if value != cls.model_fields[info.field_name].default:
            raise ValueError(f"this is trained with the flow; set train.{info.field_name} instead")
        return value

    @field_validator("init_from")
    def _has_its_own_beginning(cls, value):
        if value is not None:
            raise ValueError("this training has a beginning of its own; leave it out")
        return value

"""The refiner: a denoiser that draws the finest detail of frames anew."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cellflux_bridge.config.registry import component
from cellflux_bridge.config.schema import Count, Few, Section
from cellflux_bridge.training.settings import TrainConfig

_SMALL = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "attention": [], "predict": "velocity"}
Network = component("velocity", "refiner.velocity", default="unet", **_SMALL)


class RefinerTrainConfig(TrainConfig):
    """The training of a refiner: shorter than that of a flow, on the flow's devices, and without sheets of samples."""

    steps: Count = 600
    batch_size: Few = 32
    optimiser: Literal["adamw", "muon"] = "muon"
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-3
    lr_decay: Literal["none", "linear"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Count = 200
    sample_every: Annotated[int, Field(ge=0)] = 0

    @field_validator("accelerator", "devices", "num_nodes", "strategy", "precision")
    def _is_that_of_the_flow(cls, value, info):
        if value != cls.model_fields[info.field_name].default:
            raise ValueError(f"the refiner is trained with the flow; set train.{info.field_name} instead")
        return value

    @field_validator("init_from")
    def _begins_anew(cls, value):
        if value is not None:
            raise ValueError("a refiner is trained anew; leave it out")
        return value


class RefinerConfig(Section):
    """`scale` is the standard deviation of the noise that frames get, whose values lie in [-1, 1]; 0: no refiner."""

    scale: Annotated[float, Field(ge=0, le=1)] = 0.0
    window: Few = 32  # of training: the side, in px, of what is cut from larger patches; fine detail is local
    velocity: Network
    train: RefinerTrainConfig = RefinerTrainConfig()

    @field_validator("velocity")
    def _predicts_the_noise(cls, value):
        if value.get("predict", "velocity") != "velocity":
            raise ValueError(f"predict={value['predict']}: a refiner tells the noise itself; set predict: velocity")
        return value

"""The refiner: a denoiser that draws the finest detail of frames anew."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cellflux_bridge.config.registry import component
from cellflux_bridge.config.schema import Count, Few, Section
from cellflux_bridge.training.settings import CompanionTrainConfig

_SMALL = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "attention": [], "predict": "velocity"}
Network = component("velocity", "refiner.velocity", default="unet", **_SMALL)


class RefinerTrainConfig(CompanionTrainConfig):
    """The training of a refiner."""

    steps: Count = 600
    optimiser: Literal["adamw", "muon"] = "muon"
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 50


class RefinerConfig(Section):
    """`scale` is the standard deviation of the noise on frames of level 1 (values in [-1, 1]); 0: no refiner."""

    scale: Annotated[float, Field(ge=0, le=1)] = 0.0
    window: Few = 32  # of training: the side, in px, of what is cut from larger patches; fine detail is local
    velocity: Network
    train: RefinerTrainConfig = RefinerTrainConfig()

    @field_validator("velocity")
    def _predicts_the_noise(cls, value):
        if value.get("predict", "velocity") != "velocity":
            raise ValueError(f"predict={value['predict']}: a refiner tells the noise itself; set predict: velocity")
        return value

"""The refiner: a denoiser that draws the finest detail of frames anew."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _is_trained_where_the_flow_is(self):
        for key in ("accelerator", "devices", "num_nodes", "strategy", "precision"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: the refiner is trained with the flow; set train.{key} instead")
        return self


class RefinerConfig(Section):
    """`scale` is the standard deviation of the noise that frames get, whose values lie in [-1, 1]; 0: no refiner."""

    scale: Annotated[float, Field(ge=0, le=1)] = 0.0
    window: Few = 32  # of training: the side, in px, of what is cut from larger patches; fine detail is local
    velocity: Network
    train: RefinerTrainConfig = RefinerTrainConfig()

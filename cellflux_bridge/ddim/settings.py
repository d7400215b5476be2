"""The reference: Cellflow's classifier-guided DDIM bridge."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cellflux_bridge.classifier.settings import ClassifierTrainConfig
from cellflux_bridge.config.schema import Count, Fraction, NonNegative, Section
from cellflux_bridge.training.settings import TrainConfig


class DenoiserTrainConfig(TrainConfig):
    """The training of the reference bridge's denoiser: without sheets of samples."""

    sample_every: Annotated[int, Field(ge=0)] = 0


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


class DDIMConfig(Section):
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

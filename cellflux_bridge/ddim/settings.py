"""DDIM stairs, Cellflow's classifier-guided method, which is the reference here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cellflux_bridge.classifier.settings import ClassifierTrainConfig
from cellflux_bridge.config.schema import Blocks, Count, FewLevels, Fraction, NonNegative, Section
from cellflux_bridge.training.settings import TrainConfig


class DenoiserTrainConfig(TrainConfig):
    """The training of the denoiser: without sheets of samples."""

    sample_every: Annotated[int, Field(ge=0)] = 0


# A map is channels times its multiplier wide, as 0.5 x 256 in ADM's networks of 512 px.
Multipliers = Annotated[tuple[Annotated[int | float, Field(gt=0)], ...], FewLevels]


class ADMConfig(Section):
    """Size of an ADM network (Dhariwal & Nichol 2021); `attention` names the sides, in px, of the maps that attend."""

    channels: Annotated[int, Field(ge=32, multiple_of=32)] = 32
    multipliers: Multipliers = (1, 2, 4, 4)
    blocks: Blocks = 1
    attention: tuple[Count, ...] = (8,)
    head_channels: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    new_attention_order: bool = False
    weights: Path | None = None  # a guided-diffusion or Cellflow .pt file, used instead of a training
    train: DenoiserTrainConfig = DenoiserTrainConfig()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps, from the outermost to the innermost."""
        return tuple(int(self.channels * multiplier) for multiplier in self.multipliers)

    @field_validator("multipliers")
    @classmethod
    def _give_groups(cls, multipliers, info):
        channels = info.data.get("channels", 32)  # absent where it is wrong itself
        if any(channels * multiplier % 32 for multiplier in multipliers):
            raise ValueError(f"times channels ({channels}) they must give multiples of 32, the groups of the network")
        return multipliers

    @model_validator(mode="after")
    def _attention_order_is_stated(self):
        if self.weights is not None and "new_attention_order" not in self.model_fields_set:
            raise ValueError("weights need new_attention_order stated (false for guided-diffusion's releases)")
        return self


class NoisyClassifierConfig(ADMConfig):
    """Size and training of the classifier of noised images."""

    multipliers: Multipliers = (1, 2, 2)
    train: ClassifierTrainConfig = ClassifierTrainConfig()


class DDIMConfig(Section):
    """DDIM stairs. A key that `source_denoiser` leaves out has the value of `denoiser`; its weights must be stated."""

    learn_sigma: bool = False
    denoiser: ADMConfig = ADMConfig()
    source_denoiser: ADMConfig | None = None  # weights of a network that encodes; null: the denoiser does
    classifier: NoisyClassifierConfig = NoisyClassifierConfig()
    timesteps: Annotated[int, Field(ge=2, le=1000)] = 100  # of the respaced schedule
    depths: Literal["uniform", "fourier", "fourier_unmirrored"] | list[Annotated[int, Field(ge=1)]] = "uniform"
    guidance: Literal["classifier", "classifier_free", "none"] = "classifier"
    scale: NonNegative = 2.0  # of the classifier's gradient
    weight: NonNegative = 1.8  # of classifier-free guidance, on both ways; see `ddim.steps.NoisePredictor`
    class_dropout: Fraction = 0.1  # of the denoiser's training for classifier-free guidance

    @model_validator(mode="before")
    @classmethod
    def _source_denoiser_is_like_the_denoiser(cls, data):
        if isinstance(data, dict) and isinstance(source := data.get("source_denoiser"), dict):
            denoiser = data["denoiser"] if isinstance(data.get("denoiser"), dict) else {}
            shared = {key: denoiser[key] for key in denoiser.keys() - {"weights", "new_attention_order"}}
            return {**data, "source_denoiser": {**shared, **source}}
        return data

    @model_validator(mode="after")
    def _source_denoiser_has_weights(self):
        if self.source_denoiser is not None and self.source_denoiser.weights is None:
            raise ValueError("source_denoiser needs weights: only one denoiser is trained here")
        return self

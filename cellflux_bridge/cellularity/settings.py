"""What the nuclei network is trained on, and how."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from cellflux_bridge.config import Root
from cellflux_bridge.config.schema import Count, Fraction, NonNegative, Section
from cellflux_bridge.training.settings import TrainConfig

Positive = Annotated[float, Field(gt=0)]


class LabelSet(Section):
    """A folder of images/ and labels/ (see `label_maps`), with the groups of its index.csv."""

    folder: Path
    weight: NonNegative = 1.0  # of its crops among those of all sets
    scale: Positive = 1.0  # that brings most nuclei to a diameter of about 16 px
    foreground_only: bool = False  # touching nuclei are merged: only "nuclear or not" is learnt
    groups: list[str] | None = None  # null: all
    without: tuple[str, ...] = ()


class NucleiNetConfig(Section):
    widths: tuple[Count, Count, Count, Count] = (24, 48, 88, 112)
    init_from: str | None = None  # weights to go on from: "built-in", a run folder or a .safetensors file


class AugmentationConfig(Section):
    scale: tuple[Positive, Positive] = (0.5, 2.0)  # of lengths: their logarithm is drawn, its middle most often
    stain: Annotated[float, Field(ge=0, lt=1)] = 0.35  # see `images.stain.augment`
    artefacts: Fraction = 0.35  # share of crops that show pen, red cells, borders and the like

    @model_validator(mode="after")
    def _scale_goes_up(self):
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: expected [smallest, largest], found {list(self.scale)}")
        return self


class NucleiConfig(Root):
    """A training of the nuclei network: `train-nuclei`'s whole configuration."""

    sets: Annotated[list[LabelSet], Field(min_length=1)]
    phantoms: NonNegative = 1.0  # weight of phantom tissue
    drawn: NonNegative = 0.5  # weight of fields of plain cells, nuclei and red ones
    validation: tuple[LabelSet, ...] = ()
    crop: Annotated[int, Field(ge=32, multiple_of=16)] = 128
    network: NucleiNetConfig = NucleiNetConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _is_trained_and_validated_on_something(self):
        if not sum(one.weight for one in self.sets) + self.phantoms + self.drawn > 0:
            raise ValueError("every weight is 0 (sets, phantoms, drawn); expected one above 0")
        if any(one.foreground_only for one in self.validation):
            raise ValueError("validation counts single nuclei; leave sets with foreground_only out of it")
        return self

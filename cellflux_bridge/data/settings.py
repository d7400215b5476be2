"""Where patches come from, what they look like, and how they are paired."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, field_validator, model_validator

from cellflux_bridge.config.registry import component
from cellflux_bridge.config.schema import Count, Few, Fraction, Section


def _rising(value_range: tuple[float, float]) -> tuple[float, float]:
    if not value_range[0] < value_range[1]:
        raise ValueError(f"expected [low, high] with low below high, found {list(value_range)}")
    return value_range


ValueRange = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]
Layout = component("layout", "data.layout", default="folder")


class StainConfig(Section):
    """What is done about stain: nothing, every image normalised, or jitter in optical density while training."""

    mode: Literal["none", "normalise", "augment"] = "none"
    method: Literal["reinhard", "macenko"] = "reinhard"
    strength: Annotated[float, Field(gt=0, le=1)] = 0.1


class SplitConfig(Section):
    """Fractions of groups for a validation or test split that the data does not name.

    They are taken from the patches that would train, named so or not; 0 takes none and leaves that split empty.
    `train_groups` names the groups that train, of all that would (a patch in no group is its own, by its id); the
    others stand in no split. `unseen` names classes that no training sees: all their patches are test patches, or stand
    in no split where data.classes leaves such a class out.
    """

    val: Fraction = 0.1
    test: Fraction = 0.2
    train_groups: list[str] | None = None
    unseen: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _leaves_training_data(self):
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must stay below 1 so that training keeps some, found {self.val + self.test}")
        return self


class DataConfig(Section):
    root: Path
    layout: Layout
    classes: list[str] | None = None
    batches: list[str] | None = None  # plates or experiments in the order of their numbers; the data's by default
    without: Path | None = None  # a text file of patches to leave out, an id (as in a report of them) a line
    image_size: Annotated[int, Field(ge=8, le=16_384)] = 64
    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    value_range: ValueRange | None = None  # the files' values that become 0 and 255; without it they are uint8
    crop: Count | None = None
    enlarge: bool = False  # whether files may be enlarged to image_size
    flips: bool = True
    stain: StainConfig = StainConfig()
    split: SplitConfig = SplitConfig()
    cache_dir: Path = Path("~/.cache/cellflux_bridge")
    workers: Annotated[int, Field(ge=0, le=4096)] = 0

    @model_validator(mode="after")
    def _stain_is_of_rgb(self):
        if self.stain.mode != "none" and self.channels != 3:
            raise ValueError(f"stain.mode={self.stain.mode} is for RGB images only, found channels={self.channels}")
        return self

    @field_validator("classes", "batches")
    @classmethod
    def _differ(cls, names):
        if repeated := [name for name, num in Counter(names or ()).items() if num > 1]:
            raise ValueError(f"{repeated[0]!r} stands twice")
        return names


class PairsConfig(Section):
    transitions: Literal["all"] | list[tuple[str, str]] = "all"  # "*" in a pair: any other class
    identity: bool = False
    self_pairs: Fraction = 0.0  # by level: how often a source that has the target's level already is its own target
    match_group: bool = False
    match_batch: bool = False  # source and target are of one batch
    batch_without_source: Literal["error", "leave_out"] = "error"
    pool: Few = 1  # batches whose pairs are chosen together

    @model_validator(mode="after")
    def _match_one(self):
        if self.match_group and self.match_batch:
            raise ValueError("match_group and match_batch are both on; choose one")
        return self

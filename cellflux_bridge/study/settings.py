"""What a study compares: arms of augmentation, backbones, sizes of the training set."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.settings import ClassifierTrainConfig
from cellflux_bridge.config import Root, registry
from cellflux_bridge.config.schema import Count, Few, Section, nearest
from cellflux_bridge.data.settings import DataConfig

FORMAT = 1  # of study.json
Ratio = Annotated[float, Field(gt=0, le=100)]


class GeneratorConfig(Section):
    """Where made images come from: a flow or a reference bridge, trained anew on the training groups of every size, or
    a folder root/<class>/... of images that were made elsewhere."""

    config: Path | None = None  # YAML of its training; its data section is replaced by the study's
    set: list[str] = Field(default=[])  # key.sub=value settings over that file
    kind: Literal["flow", "ddim"] = "flow"
    # forward: from the first class to the last alone; all: also of a class to itself, for images from noise
    directions: Literal["both", "forward", "all"] = "both"
    folder: Path | None = None

    @model_validator(mode="after")
    def _comes_from_one_place(self):
        if (self.config is None) == (self.folder is None):
            raise ValueError("expected config (a YAML file to train) or folder (of made images), one of them")
        return self


class ArmConfig(Section):
    """What is done with the training images: more of them, from a generator, and an augmentation of every batch. Flips
    and quarter turns are in all arms."""

    images: str | None = None  # a generator
    ratio: Ratio = 1.0  # made images for each real one; they take this share of every batch, too
    levels: Literal["inner", "ends", "all"] = "inner"  # of stairs: between the ends, level 1 alone, or both
    # nominal: as the stair says; classifier: as a calibrated classifier of the training groups says
    labels: Literal["nominal", "classifier"] = "nominal"
    # centroid: of images whose nearest class centroid is that of their label the nearest ones (HistoDiffusion);
    # confidence: of these the ones of which a classifier is surest
    select: Literal["random", "centroid", "confidence"] = "random"
    augmentation: dict[str, Any] | None = None

    @field_validator("augmentation", mode="before")
    @classmethod
    def _is_known(cls, spec):
        return None if spec is None else registry.validate("augmentation", spec, key="arms.<name>.augmentation")

    @property
    def asks_guide(self) -> bool:
        return self.images is not None and (self.select != "random" or self.labels == "classifier")

    @property
    def family(self) -> str:
        """What an arm is of: "base", "augmentation", "images", or "images and augmentation"."""
        parts = [name for name, given in (("images", self.images), ("augmentation", self.augmentation)) if given]
        return " and ".join(parts) or "base"


class BackboneConfig(Section):
    """`small` (built in), any timm name, or a preset of a foundation model (uni, virchow2)."""

    name: str = "small"
    pretrained: bool = False
    frozen: bool = False  # a linear probe on features
    size: Count | None = None  # px that patches are brought to; null: its own where it has one, else the patch's
    weights: Path | None = None  # a local folder with them, where the hub cannot be reached; pretrained is then implied

    @field_validator("name")
    @classmethod
    def _comes_from_the_hub_for_the_user_alone(cls, name):
        if ":" in name:
            registry.require_trusted(
                name, key="backbones.<name>.name", what="fetched from elsewhere", not_done="fetched"
            )
        return name


class StudyTrainConfig(ClassifierTrainConfig):
    """The training of every classifier of a study, alike in all arms."""

    steps: Count = 400
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    lr_decay: Literal["none", "linear"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99


class PrimaryConfig(Section):
    """The one test that is named before the study is run: the best of `arms` against the best of `against`, each chosen
    by balanced accuracy on validation patches, at one size and with one backbone."""

    arms: Annotated[list[str], Field(min_length=1)]
    against: Annotated[list[str], Field(min_length=1)]
    size: Count | Literal["all"]
    backbone: str


class StudyConfig(Root):
    """The configuration of a study."""

    data: DataConfig
    generators: dict[str, GeneratorConfig] = Field(default={})
    guide: list[str] = Field(
        default=[]
    )  # settings of the classifier, trained for each size, that guides, labels and selects
    arms: Annotated[dict[str, ArmConfig], Field(min_length=1)]
    base: str = "base"  # the arm that all others are compared with
    backbones: dict[str, BackboneConfig] = Field(default={"small": BackboneConfig()}, min_length=1)
    sizes: list[Count | Literal["all"]] = Field(default=["all"], min_length=1)  # training groups of every class
    seeds: Few = 5
    near_copies: Literal["refuse", "leave_out"] = "refuse"  # of held-out patches among those that train
    train: StudyTrainConfig = StudyTrainConfig()
    primary: PrimaryConfig | None = None

    def beside(self, folder: Path) -> "StudyConfig":
        """With the files of generators' configurations found beside the study's own file, `folder`."""
        found = {}
        for name, of in self.generators.items():
            file = of.config
            if file is not None and not file.is_file():
                file = folder / file
                if not file.is_file():
                    raise UserError(f"generators.{name}.config={of.config}: no such file, nor in {folder}")
            found[name] = of.model_copy(update={"config": file and file.absolute()})
        return self.model_copy(update={"generators": found})

    @model_validator(mode="after")
    def _names_can_be_folders(self):
        for key, names in (("arms", self.arms), ("generators", self.generators), ("backbones", self.backbones)):
            folded = [name.casefold() for name in names]
            if again := [name for name in names if folded.count(name.casefold()) > 1]:
                raise UserError(f"{key}: {' and '.join(again)} differ by letter case only; name them otherwise")
            if wrong := [name for name in names if not name.strip(" .") or name.endswith((".", " ")) or "|" in name]:
                raise UserError(f"{key}: {wrong[0]!r} cannot be a name here; leave out | and dots or blanks at its end")
        if taken := {"guide", "guide_rgb"}.intersection(map(str.casefold, self.generators)):
            raise UserError(f"generators.{taken.pop()}: is the guide's own name; choose another")
        if again := [size for size in self.sizes if self.sizes.count(size) > 1]:
            raise UserError(f"sizes: {again[0]} stands twice")
        return self

    @model_validator(mode="after")
    def _names_what_is_there(self):
        _require(self.arms, [self.base], key="base", kind="arm")
        for name, arm in self.arms.items():
            if arm.images is not None:
                _require(self.generators, [arm.images], key=f"arms.{name}.images", kind="generator")
        if self.primary is not None:
            _require(self.arms, self.primary.arms, key="primary.arms", kind="arm")
            _require(self.arms, self.primary.against, key="primary.against", kind="arm")
            _require(self.backbones, [self.primary.backbone], key="primary.backbone", kind="backbone")
            _require(map(str, self.sizes), [str(self.primary.size)], key="primary.size", kind="size")
            if both := set(self.primary.arms) & set(self.primary.against):
                raise UserError(f"primary: {', '.join(sorted(both))} stands on both sides")
        return self


def _require(known: Iterable[str], wanted: Iterable[str], *, key: str, kind: str) -> None:
    known = list(known)
    for name in wanted:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"{key}: no {kind} called {name!r}{nearest(name, known)}; known here: {there}")

"""The JSON files of a run, as a report reads them.

A run may come from somebody else, so every key is checked for its type and range before anything is made of it.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular
from cellflux_bridge.cellularity.along import FORMAT as CELLULARITY_FORMAT
from cellflux_bridge.cellularity.parameters import Parameters, Scale
from cellflux_bridge.metrics.perturbation_files import FORMAT as PERTURBATIONS_FORMAT
from cellflux_bridge.metrics.perturbation_files import MOST_DRAWN
from cellflux_bridge.metrics.results import FORMAT as METRICS_FORMAT
from cellflux_bridge.study.settings import FORMAT as STUDY_FORMAT

_MOST_BYTES = 1 << 29
# Of methods and of figures of cells under perturbations, which span tables.
_MOST_NAMES = 50
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Level = Annotated[float, Field(ge=0, le=1)]
_Levels = Annotated[tuple[_Level, ...], Field(max_length=10_000)]
_Place = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]
_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figure(_Part):
    """A number that rests on `n` images, with its 95 % interval; None where one does not exist."""

    quantity: str
    n: _Count
    value: _Number = Field(validation_alias=AliasChoices("value", "mean"))
    low: _Number
    high: _Number
    n_real: _Count | None = None
    level: _Level | None = None
    method: str = ""
    extractor: str = ""
    label: str = Field("", validation_alias="class")


class NetworkRecord(_Part):
    name: str
    use: str
    view: str
    checkpoint: _Place
    image_size: Annotated[int, Field(ge=1, le=8192)]
    digest: str = ""
    blind_for: tuple[str, ...] = ()


class MethodRecord(_Part):
    """A method, or a baseline, whose `trajectory` is None."""

    name: str
    trajectory: _Place | None
    method: str | None
    config_hash: str | None
    n: _Count
    levels: _Levels
    frame_levels: _Levels
    device: str | None = None

    @model_validator(mode="after")
    def _one_frame_a_level(self) -> "MethodRecord":
        if len(self.levels) != len(self.frame_levels):
            raise ValueError(f"{len(self.frame_levels)} frame_levels for {len(self.levels)} levels")
        return self


class Difference(_Part):
    first: str
    second: str
    quantity: str
    extractor: str
    n: _Count
    num_groups: _Count
    difference: _Number
    low: _Number
    high: _Number
    p: _Number


class NearCopyRecord(_Part):
    trajectory: _Place
    source_id: str
    training_id: str
    level: _Level


class Memorisation(_Part):
    """Of the training set: the configuration's folder, and the frames that lie nearest to a training patch."""

    patches: _Place = ""
    near_copies: tuple[NearCopyRecord, ...] = ()


class Metrics(_Part):
    """metrics.json."""

    source: str
    target: str
    networks: tuple[NetworkRecord, ...]
    methods: tuple[MethodRecord, ...]
    values: tuple[Figure, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...] = ()
    spectra: dict[str, Annotated[tuple[_Number, ...], Field(max_length=4096)]] = {}
    memorisation: Memorisation | None = None


class SourceCurves(_Part):
    """Numbers by level of one source; None where nuclei could not be counted or the quantity is refused."""

    source_id: str
    area_fraction: tuple[_Number, ...] | None = None
    count: tuple[_Number, ...] | None = None


class CountedTrajectory(_Part):
    trajectory: _Place
    config_hash: str
    levels: _Levels
    curves: tuple[Figure, ...]
    spearman: tuple[Figure, ...]
    per_source: tuple[SourceCurves, ...]

    @model_validator(mode="after")
    def _one_number_a_level(self) -> "CountedTrajectory":
        for source in self.per_source:
            for values in (source.area_fraction, source.count):
                if values is not None and len(values) != len(self.levels):
                    raise ValueError(f"{len(values)} numbers of {source.source_id!r} for {len(self.levels)} levels")
        return self


class Cellularity(_Part):
    """cellularity.json."""

    parameters: Parameters
    scale: Scale | None = None
    mpp: Annotated[float, Field(ge=0.01, le=100)] | None = None
    trajectories: tuple[CountedTrajectory, ...] = ()
    real: tuple[Figure, ...] = ()
    real_by_level: tuple[Figure, ...] = ()


_Interval = tuple[_Number, _Number, _Number]


class StudyArm(_Part):
    """An arm at a size with a backbone ("" for a baseline without one); figures are value, low and high."""

    size: int | str
    backbone: str
    arm: str
    family: str
    seeds: _Count
    val_balanced_accuracy: _Number
    figures: dict[str, _Interval]
    difference: _Interval | None
    p: _Number
    p_holm: _Number


class PrimaryTest(_Part):
    arm: str
    against: str
    difference: _Interval
    p: _Number


class Study(_Part):
    """study.json."""

    name: str
    base: str
    primary: PrimaryTest | None
    primary_words: str
    rows: Annotated[tuple[StudyArm, ...], Field(max_length=100_000)]
    notes: tuple[str, ...]


class PerturbationRow(_Part):
    """A figure of a method; `estimate` is value, low and high."""

    method: str
    perturbations: Literal["seen", "unseen", "all"]
    figure: str
    by: str
    estimate: _Interval
    num: _Count


class Perturbations(_Part):
    """perturbations.json."""

    name: str
    rows: Annotated[tuple[PerturbationRow, ...], Field(max_length=2000)]
    notes: Annotated[tuple[str, ...], Field(max_length=100)]
    drawn: Annotated[tuple[str, ...], Field(max_length=MOST_DRAWN)]

    @model_validator(mode="after")
    def _tables_of_few_cells(self) -> "Perturbations":
        for key in ("method", "figure"):
            if (num := len({getattr(row, key) for row in self.rows})) > _MOST_NAMES:
                raise ValueError(f"{num} names of a {key}, {_MOST_NAMES} at most")
        return self


_Model = TypeVar("_Model", Metrics, Cellularity, Study, Perturbations)
# The format that is read of each file, and the command that makes it.
_MADE = {
    Metrics: (METRICS_FORMAT, "evaluate TRAJECTORY ... --output {}"),
    Cellularity: (CELLULARITY_FORMAT, "cellularity TRAJECTORY ... --output {}"),
    Study: (STUDY_FORMAT, "study STUDY.yaml"),
    Perturbations: (PERTURBATIONS_FORMAT, "perturbations RUN"),
}


def read(file: Path, model: type[_Model]) -> _Model:
    """The JSON file of a run or study. UserError names what is wrong and the command that makes the file again."""
    known, command = _MADE[model]
    try:
        if regular(file).stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES:,} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
        if (found := data.get("format") if isinstance(data, dict) else None) != known:
            raise ValueError(f"format {found}, this version reads {known}")
        return model.model_validate(data)
    except ValidationError as error:
        problem, *others = error.errors()
        wrong = ".".join(map(str, problem["loc"])) + f": {problem['msg']}" + f" (and {len(others)} more)" * bool(others)
    except (OSError, ValueError, RecursionError) as error:
        wrong = f"cannot be read ({error})"
    raise UserError(f"{file}: {wrong}; make it again with: cellflux-bridge {command.format(file)}")

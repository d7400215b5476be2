"""The chapter of a study: its primary test, and every arm beside the base arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cellflux_bridge.images import read_rgb
from cellflux_bridge.report.gallery import encode_row
from cellflux_bridge.report.reading import Study, StudyArm, read

STUDY, _MADE = "study.json", "figures/made.png"
# What lies beyond the outermost interval of a plot, in points, and how wide a picture is at most.
_MARGIN, _WIDEST = 0.5, 1600


class Bar(NamedTuple):
    """A difference and its interval, in per cent of the plot's width."""

    low: float
    value: float
    high: float


class Panel(NamedTuple):
    """The arms at one size with one backbone, each with its bar; `zero` is where no difference lies, in per cent, and
    `ends` are the differences, in points, at both ends of the plot."""

    title: str
    rows: list[tuple[StudyArm, Bar | None]]
    zero: float
    ends: tuple[float, float]


class StudyView(NamedTuple):
    """What the template shows of a study; `made` is a picture of made images as a data URI."""

    record: Study
    file: Path
    panels: list[Panel]
    made: str | None


def is_study(folder: Path) -> bool:
    return (folder / STUDY).is_file()


def load_studies(folders: Sequence[Path]) -> list[StudyView]:
    """Study folders; UserError for a damaged study.json."""
    return [_view(folder, read(folder / STUDY, Study)) for folder in folders]


def _view(folder: Path, record: Study) -> StudyView:
    panels = []
    for size in dict.fromkeys(row.size for row in record.rows):
        alone = [row for row in record.rows if row.size == size and not row.backbone]
        for backbone in dict.fromkeys(row.backbone for row in record.rows if row.size == size and row.backbone):
            rows = [row for row in record.rows if (row.size, row.backbone) == (size, backbone)]
            panels.append(_panel(f"{size} training groups of every class, {backbone}", [*rows, *alone]))
    made = encode_row([read_rgb(folder / _MADE)], _WIDEST, "PNG") if (folder / _MADE).is_file() else None
    return StudyView(record, folder / STUDY, panels, made)


def _panel(title: str, rows: list[StudyArm]) -> Panel:
    points = [[100 * v for v in row.difference or () if v is not None] for row in rows]
    low, high = (of(0.0, *(v for own in points for v in own)) for of in (min, max))
    low, high = low - _MARGIN, high + _MARGIN

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    bars = [Bar(place(own[1]), place(own[0]), place(own[2])) if len(own) == 3 else None for own in points]
    return Panel(title, list(zip(rows, bars, strict=True)), place(0.0), (low, high))

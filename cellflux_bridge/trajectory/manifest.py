"""The manifest of a trajectory folder: one row a frame, written and read back to the same ids, labels and numbers."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import csv_text, unguarded
from cellflux_bridge.trajectory.header import TrajectoryHeader, read_limited

MANIFEST = "manifest.csv"
# A folder may come from somebody else: a larger manifest is refused before it is read.
_MAX_BYTES = 2**28


class Frame(NamedTuple):
    """One row. `depth` is None for methods without depths; `line` is the row's last line in the file that it is of."""

    file: str
    source_id: str
    level: float
    nfe: int
    gradients: int
    depth: float | None
    soft_label: tuple[float, ...]
    line: int = 0


def manifest_text(
    header: TrajectoryHeader, frames: Iterable[Frame], *, has_depth: bool, has_heading: bool = True
) -> str:
    """Rows as CSV text, with a column of depths if `has_depth`, below the names of the columns if `has_heading`."""
    rows: list[list] = [_columns(header, has_depth=has_depth)] * has_heading
    for frame in frames:
        depth = [None if frame.depth is None else f"{frame.depth:g}"] * has_depth
        cells = [frame.file, frame.source_id, repr(frame.level), frame.nfe, frame.gradients, *depth]
        rows.append([*cells, *(f"{p:.6g}" for p in frame.soft_label)])
    return csv_text(rows)


def _columns(header: TrajectoryHeader, *, has_depth: bool) -> list[str]:
    names = ["file", "source_id", "level", "nfe", "gradients", *["depth"] * has_depth]
    return [*names, *(f"p_{name}" for name in header.classes)]


def read_whole(path: Path, header: TrajectoryHeader) -> tuple[dict[str, list[Frame]], set[str]]:
    """By source, the frames of a manifest's whole sequences in the order of their levels; and the names of all sources.

    A last row that a stop has cut is left out. Raises UserError that names the line of a damaged row.
    """
    # Without its line's end a row may have lost digits of its last number, too.
    data = read_limited(path, most=_MAX_BYTES).rpartition(b"\n")[0]
    try:
        lines = io.StringIO(data.decode(), newline="").readlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    rows = csv.reader(lines)
    grouped: dict[str, list[Frame]] = {}
    try:
        columns = next(rows, plain := _columns(header, has_depth=False))
        if columns not in (plain, _columns(header, has_depth=True)):
            raise ValueError(f"expected the columns {', '.join(plain)}, and perhaps depth")
        for cells in rows:
            if len(cells) == len(columns):
                frame = _frame(cells, has_depth=columns != plain, line=rows.line_num)
                grouped.setdefault(frame.source_id, []).append(frame)
            elif cells and rows.line_num < len(lines):  # else it is blank, or cut within an id of several lines
                raise ValueError(f"{len(cells)} cells, expected {len(columns)}")
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error
    num = len(header.levels)
    for source_id, frames in grouped.items():
        frames.sort(key=lambda frame: frame.level)
        if extra := frames[num:]:
            raise UserError(f"{path}, line {extra[0].line}: more frames of {source_id!r} than the run has levels")
        whole = frames if len(frames) == num else []
        for frame, level in zip(whole, header.levels[: len(whole)], strict=True):
            if abs(frame.level - level) > 1e-6:
                raise UserError(f"{path}, line {frame.line}: expected level {level:g} of {source_id!r}")
    return {source_id: frames for source_id, frames in grouped.items() if len(frames) == num}, set(grouped)


def _frame(cells: list[str], *, has_depth: bool, line: int) -> Frame:
    """A row's cells as a frame; ValueError for what is no number, or none that can be."""
    file, source_id, level, nfe, gradients, *rest = cells
    text = rest.pop(0) if has_depth else ""
    place, depth, *labels = (float(number) for number in (level, text or "0", *rest))
    if not all(map(math.isfinite, (place, depth, *labels))):
        raise ValueError("a number that is not finite")
    if min(labels) < 0 or abs(sum(labels) - 1) > 1e-3:
        raise ValueError(f"probabilities {', '.join(rest)}: expected numbers from 0 to 1 that sum to 1")
    counts = int(nfe), int(gradients)
    return Frame(file, unguarded(source_id), place, *counts, depth if text else None, tuple(labels), line)

"""Trajectory, the waist of the house: sequences of finished images from A to B, and the folder that holds them.

Everything that makes sequences (a flow, a reference bridge, a user's own frames) writes Trajectories; everything that
judges or shows them reads Trajectories and never sees a network. On disk a trajectory is a folder:

    trajectory.json     what was made: method, source, target, classes, levels, config hash; mpp, where it is known
    manifest.csv        one row a frame: file, source_id, level, nfe and gradients of its sequence, p_<class> for each
    frames/*.png        <running number>_<source stem>/<frame>.png

Batches are written as they are finished, so that a stopped run keeps what it made and resumes.
"""

import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import read_rgb
from cellflux_bridge.trajectory.header import MANIFEST, Trajectory, TrajectoryHeader, read_header


def _columns(header: TrajectoryHeader) -> list[str]:
    return ["file", "source_id", "level", "nfe", "gradients", *(f"p_{name}" for name in header.classes)]


def _rows_of(manifest: Path, header: TrajectoryHeader) -> dict[str, list[dict[str, str]]]:
    """By source, the rows of a manifest that are not cut."""
    try:
        # Without its line's end a row may have lost digits of its last number, too.
        text = manifest.read_bytes().rpartition(b"\n")[0].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: cannot be read ({error})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if text and reader.fieldnames != _columns(header):
        raise UserError(f"{manifest}: expected the columns {', '.join(_columns(header))}")
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in reader:
        rows = grouped.setdefault(row["source_id"], [])
        if None not in row and None not in row.values():
            rows.append(row)
    return grouped


def _sequences_of(manifest: Path, header: TrajectoryHeader) -> dict[str, list[dict[str, str]]]:
    """By source, the rows of a manifest's sequences whose every frame is listed (a stop can cut the last one)."""
    return {source: rows for source, rows in _rows_of(manifest, header).items() if len(rows) == len(header.levels)}


def _whole_sequences(folder: Path, header: TrajectoryHeader) -> list[list[dict[str, str]]]:
    """The sequences of every process, in the run's order."""
    whole: dict[str, list[dict[str, str]]] = {}
    for manifest in sorted(folder.glob("manifest*.csv")):
        whole |= _sequences_of(manifest, header)
    return sorted(whole.values(), key=lambda rows: rows[0]["file"])


def read_source_ids(folder: Path) -> tuple[str, ...]:
    """The sources of a folder's whole sequences, in the run's order, without a look at their frames."""
    return tuple(rows[0]["source_id"] for rows in _whole_sequences(folder, read_header(folder)))


def count_incomplete(folder: Path) -> int:
    """How many sources have some rows in a folder's manifest, but not one for each level; readers leave them out."""
    header = read_header(folder)
    named = {source for manifest in folder.glob("manifest*.csv") for source in _rows_of(manifest, header)}
    return len(named - set(read_source_ids(folder)))


def load_trajectory(
    folder: Path, *, start: int = 0, num: int | None = None, source_ids: Collection[str] | None = None
) -> Trajectory:
    """The sequences `start` to `start + num` (all by default) of a trajectory folder, in the run's order; of those of
    `source_ids` alone, where they are given.

    Raises UserError for a folder without sequences and for frames that are missing, unreadable or of another size.
    """
    header = read_header(folder)
    chosen = _whole_sequences(folder, header)
    if source_ids is not None:
        chosen = [rows for rows in chosen if rows[0]["source_id"] in source_ids]
    chosen = chosen[start : None if num is None else start + num]
    if not chosen:
        raise UserError(f"{folder}: holds no whole sequence from number {start} on")
    return _load(folder, header, chosen)


def iter_trajectory(folder: Path, *, batch_size: int = 64) -> Iterator[Trajectory]:
    """The sequences of a folder in batches, so that memory stays flat however many there are."""
    header = read_header(folder)
    sequences = _whole_sequences(folder, header)
    for start in range(0, len(sequences), batch_size):
        yield _load(folder, header, sequences[start : start + batch_size])


def _load(folder: Path, header: TrajectoryHeader, sequences: list[list[dict[str, str]]]) -> Trajectory:
    frames, labels, nfe, gradients = [], [], [], []
    for rows in sequences:
        try:
            rows = sorted(rows, key=lambda row: float(row["level"]))
            labels.append([[float(row[f"p_{name}"]) for name in header.classes] for row in rows])
            nfe.append(int(rows[0]["nfe"]))
            gradients.append(int(rows[0]["gradients"]))
        except ValueError as error:
            raise UserError(f"{folder / MANIFEST}: {rows[0]['source_id']}: {error}") from error
        frames.append([read_rgb(folder / row["file"]) for row in rows])
        for row, image in zip(rows, frames[-1], strict=True):
            if image.shape != frames[0][0].shape:
                size = f"{image.shape[1]} x {image.shape[0]}"
                raise UserError(f"{folder / row['file']}: {size} pixels, unlike the others")
    return Trajectory(
        header,
        np.array(frames).transpose(1, 0, 4, 2, 3),
        np.array(labels, np.float32).transpose(1, 0, 2),
        tuple(rows[0]["source_id"] for rows in sequences),
        tuple(nfe),
        tuple(gradients),
    )

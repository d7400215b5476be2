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
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import numpy as np

from cellflux_bridge.errors import UserError
from cellflux_bridge.files import replace_text
from cellflux_bridge.images import read_rgb, write_png

HEADER, MANIFEST, FORMAT = "trajectory.json", "manifest.csv", 2


@dataclass(frozen=True)
class TrajectoryHeader:
    """What all sequences of a trajectory share.

    `method` is "path" (states of the flow's ODE), "progression" or "depth" (stairs) or "ddim_bridge"; `levels` are
    K+1 rising numbers in [0, 1], 0 the source and 1 the target; `config_hash` tells settings and weights from others: a
    hash of the settings @ step : hash of the network's weights, + the same of every guide; `mpp` is microns per pixel
    of the frames, None where they are not known.
    """

    method: str
    source: str
    target: str
    classes: tuple[str, ...]
    levels: tuple[float, ...]
    config_hash: str
    mpp: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """B sequences of K+1 frames.

    frames (K+1, B, C, H, W) uint8; levels (K+1,) float; soft_labels (K+1, B, num_classes) float32, rows sum to 1;
    source_ids (B,) text; nfe (B,) network forwards and gradients (B,) classifier gradients that a sequence took, summed
    over its levels; frame 0 is the source patch itself.
    """

    header: TrajectoryHeader
    frames: np.ndarray
    soft_labels: np.ndarray
    source_ids: tuple[str, ...]
    nfe: tuple[int, ...]
    gradients: tuple[int, ...]

    def __post_init__(self):
        expected = (len(self.header.levels), len(self.source_ids))
        assert self.frames.dtype == np.uint8
        assert self.frames.shape[:2] == expected, self.frames.shape
        assert self.soft_labels.shape == (*expected, len(self.header.classes)), self.soft_labels.shape
        assert len(self.nfe) == len(self.gradients) == len(self.source_ids)

    @property
    def levels(self) -> tuple[float, ...]:
        return self.header.levels

    def sequence(self, index: int) -> np.ndarray:
        """The frames of one source as images, (K+1, H, W, C) uint8."""
        return self.frames[:, index].transpose(0, 2, 3, 1)

    @staticmethod
    def cat(parts: "Sequence[Trajectory]") -> "Trajectory":
        """Sequences of the same run joined along the batch."""
        return Trajectory(
            parts[0].header,
            np.concatenate([part.frames for part in parts], axis=1),
            np.concatenate([part.soft_labels for part in parts], axis=1),
            tuple(source_id for part in parts for source_id in part.source_ids),
            tuple(count for part in parts for count in part.nfe),
            tuple(count for part in parts for count in part.gradients),
        )


def between(source: int, target: int, levels: np.ndarray, num_classes: int) -> np.ndarray:
    """Soft labels (K, num_classes) float32 of levels (K,) between two classes: 1 - s for the one, s for the other."""
    labels = np.zeros((len(levels), num_classes), np.float32)
    labels[:, source] = 1 - np.asarray(levels)
    labels[:, target] += np.asarray(levels)
    return labels


def linear_soft_labels(header: TrajectoryHeader, num_sequences: int) -> np.ndarray:
    """Soft labels (K+1, B, num_classes) that move from the source class to the target class with the level."""
    source, target = header.classes.index(header.source), header.classes.index(header.target)
    labels = between(source, target, np.asarray(header.levels), len(header.classes))
    return np.repeat(labels[:, None], num_sequences, axis=1)


class TrajectoryWriter:
    """Writes sequences into a folder, batch by batch; opening a folder that holds the same run resumes it.

    Every process of a run has its own writer (`rank`), which appends to a manifest of its own until `finish`.
    Raises UserError where the folder holds another run or something else altogether.
    """

    def __init__(self, folder: Path, header: TrajectoryHeader, *, rank: int = 0):
        self.folder, self.header = folder, header
        self._manifest = folder / (MANIFEST if rank == 0 else f"manifest.rank{rank}.csv")
        existing = folder / HEADER
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose another output folder")
        if existing.exists():
            found = read_header(folder)
            differing = [f.name for f in fields(header) if getattr(found, f.name) != getattr(header, f.name)]
            if differing:
                hashes = f": {found.config_hash} there, {header.config_hash} here" * ("config_hash" in differing)
                raise UserError(
                    f"{folder}: holds another run (its {', '.join(differing)} differ from this one's{hashes}), made "
                    "with other settings, or before a network or guide was trained again; choose another --output, or "
                    "replace it with --overwrite"
                )
        elif folder.exists() and any(path for path in folder.iterdir() if path.suffix != ".tmp"):
            raise UserError(f"{folder}: is not empty and holds no trajectory; choose another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not existing.exists():
            text = json.dumps({"format": FORMAT, **asdict(header)}, indent=1)
            replace_text(existing, text + "\n")
        (folder / "frames").mkdir(exist_ok=True)
        if self._manifest.exists():
            # A stop can have cut the last sequence: what is left of it must not mix with its second attempt.
            self._write_manifest(self._manifest, list(_sequences_of(self._manifest, header).values()))
        self.done = {rows[0]["source_id"] for rows in _whole_sequences(folder, header)}

    def append(self, trajectory: Trajectory, *, numbers: Sequence[int]) -> None:
        """Add the sequences of a batch; `numbers` are their places in the whole run's order."""
        rows = []
        for b, (number, source_id) in enumerate(zip(numbers, trajectory.source_ids, strict=True)):
            stem = PurePosixPath(source_id.replace("\\", "/")).stem
            folder = f"frames/{number:06d}_{stem[:60]}"
            (self.folder / folder).mkdir(exist_ok=True)
            for k, rgb in enumerate(trajectory.sequence(b)):
                file = f"{folder}/{k:03d}.png"
                write_png(self.folder / file, rgb)
                labels = [f"{p:.6g}" for p in trajectory.soft_labels[k, b]]
                cost = [trajectory.nfe[b], trajectory.gradients[b]]
                rows.append([file, source_id, repr(float(trajectory.levels[k])), *cost, *labels])
        is_new = not self._manifest.exists()
        with open(self._manifest, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(_columns(self.header))
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.done.update(trajectory.source_ids)

    def finish(self) -> None:
        """Join every process's manifest into one, in the run's order. Call on rank 0 when all have ended."""
        self._write_manifest(self.folder / MANIFEST, _whole_sequences(self.folder, self.header))
        for part in self.folder.glob("manifest.rank*.csv"):
            part.unlink()

    def _write_manifest(self, path: Path, sequences: list[list[dict[str, str]]]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns(self.header))
            writer.writeheader()
            writer.writerows(row for rows in sequences for row in rows)
        os.replace(temporary, path)


def _columns(header: TrajectoryHeader) -> list[str]:
    return ["file", "source_id", "level", "nfe", "gradients", *(f"p_{name}" for name in header.classes)]


def read_header(folder: Path) -> TrajectoryHeader:
    """What `trajectory.json` of a folder says; UserError names the file and what is wrong with it."""
    path = folder / HEADER
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {HEADER} here; expected a folder that `translate` wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    wanted = {f.name for f in fields(TrajectoryHeader)}
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT or set(data) | {"mpp"} != wanted:
        raise UserError(f"{path}: expected format {FORMAT} with the keys {', '.join(sorted(wanted))}")
    if not all(isinstance(data[key], list) for key in ("classes", "levels")):
        raise UserError(f"{path}: expected lists of classes and levels")
    if (mpp := data.get("mpp")) is not None and not (isinstance(mpp, (int, float)) and mpp > 0):
        raise UserError(f"{path}: mpp {mpp!r}: expected microns per pixel, above 0, or null")
    data["classes"], data["levels"] = tuple(data["classes"]), tuple(data["levels"])
    return TrajectoryHeader(**data)


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

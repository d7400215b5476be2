"""Sequences written batch by batch, so that a stopped run keeps what it made and resumes."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text, replacing, safe_name, to_disk
from cellflux_bridge.images import write_png
from cellflux_bridge.trajectory.header import FORMAT, HEADER, Trajectory, TrajectoryHeader, inside, read_header
from cellflux_bridge.trajectory.manifest import MANIFEST, Frame, manifest_text, read_whole
from cellflux_bridge.trajectory.reader import is_whole, read_sequences


class TrajectoryWriter:
    """Writes sequences into a folder, batch by batch; opening a folder that holds the same run resumes it.

    Every process of a run has its own writer (`rank`), which appends to a manifest of its own until `finish`.
    Raises UserError where the folder holds another run, symbolic links (through which it would write elsewhere) or
    something else altogether.
    """

    def __init__(self, folder: Path, header: TrajectoryHeader, *, rank: int = 0):
        self.folder, self.header = folder, header
        self._manifest, existing = folder / (MANIFEST if rank == 0 else f"manifest.rank{rank}.csv"), folder / HEADER
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose another output folder")
        if existing.exists():
            found = read_header(folder)
            differing = [f.name for f in fields(header) if getattr(found, f.name) != getattr(header, f.name)]
            if differing:
                told = ", ".join(differing).replace("config_hash", "settings or weights")
                raise UserError(
                    f"{folder}: holds another translation; what differs: {told}. Perhaps a network or guide was "
                    "trained again since. Choose another --output, or replace it with --overwrite"
                )
            for path in folder.rglob("*"):
                if path.is_symlink():
                    raise UserError(f"{path}: is a symbolic link; remove it, or choose another output folder")
        elif folder.exists() and any(path.suffix != ".tmp" and path.name[0] != "." for path in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no trajectory; choose another output folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not existing.exists():
            replace_text(existing, json.dumps({"format": FORMAT, **asdict(header)}, indent=1) + "\n")
        (folder / "frames").mkdir(exist_ok=True)
        # A stop can have cut the last sequence: what is left of it must not mix with its second attempt.
        self._rewrite(self._own())
        whole = filter(self._is_there, read_sequences(folder, header)[0])
        self.done = {frames[0].source_id for frames in whole}

    def append(self, trajectory: Trajectory, *, numbers: Sequence[int]) -> None:
        """Add the sequences of a batch; `numbers` are their places in the whole run's order."""
        rows, depths = [], trajectory.depths
        for b, (number, source_id) in enumerate(zip(numbers, trajectory.source_ids, strict=True)):
            place, stem = f"{number:06d}_", PurePosixPath(source_id.replace("\\", "/")).stem
            folder = f"frames/{place}{safe_name(stem, room=len(place))}"
            (self.folder / folder).mkdir(exist_ok=True)
            for k, image in enumerate(trajectory.sequence(b)):
                suffix, write = ("png", write_png) if image.shape[2] == 3 else ("npy", _write_npy)
                file = f"{folder}/{k:03d}.{suffix}"
                write(self.folder / file, image)
                level, cost = float(trajectory.levels[k]), (trajectory.nfe[b], trajectory.gradients[b])
                depth = None if depths is None or np.isnan(depths[k, b]) else float(depths[k, b])
                labels = tuple(trajectory.soft_labels[k, b].tolist())
                rows.append(Frame(file, source_id, level, *cost, depth, labels))
            to_disk(self.folder / folder)
        to_disk(self.folder / "frames")
        if depths is not None and not self._has_depth:
            self._rewrite(self._own(), has_depth=True)
        text = manifest_text(self.header, rows, has_depth=self._has_depth, has_heading=False)
        with open(self._manifest, "a", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.done.update(trajectory.source_ids)

    def finish(self) -> None:
        """Join every process's manifest into one, in the run's order. Call on rank 0 when all have ended."""
        self._rewrite(read_sequences(self.folder, self.header)[0])
        for part in self.folder.glob("manifest.rank*.csv"):
            part.unlink()

    def _own(self) -> Iterable[list[Frame]]:
        """The whole sequences of this process's manifest whose frames are there."""
        found = read_whole(self._manifest, self.header)[0].values() if self._manifest.exists() else []
        return list(filter(self._is_there, found))

    def _is_there(self, frames: list[Frame]) -> bool:
        """Whether a sequence's files are whole: a loss of power can have left a name without its content."""
        return all(is_whole(inside(self.folder, frame.file)) for frame in frames)

    def _rewrite(self, sequences: Iterable[list[Frame]], *, has_depth: bool = False) -> None:
        """The manifest with these sequences alone; with depths where one has them."""
        frames = [frame for sequence in sequences for frame in sequence]
        self._has_depth = has_depth or any(frame.depth is not None for frame in frames)
        replace_text(self._manifest, manifest_text(self.header, frames, has_depth=self._has_depth))


def _write_npy(path: Path, image: np.ndarray) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.ascontiguousarray(image))

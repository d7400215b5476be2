"""Sequences written batch by batch, so that a stopped run keeps what it made and resumes."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.images import write_png
from cellflux_bridge.trajectory.header import FORMAT, HEADER, MANIFEST, Trajectory, TrajectoryHeader, read_header
from cellflux_bridge.trajectory.reader import _columns, _sequences_of, _whole_sequences


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

"""A trajectory folder as a data set: its finished images, with soft labels, as training patches."""

from pathlib import Path
from typing import Literal

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.layout.base import Layout, PatchRecord
from cellflux_bridge.trajectory import iter_frames, read_header


class Trajectory(Layout):
    """The frames of a trajectory's whole sequences: one record a frame, which trains.

    `score` is the share of the target in the frame's soft label, the label is the class of the larger share, and the
    sequence is the group. `frames`: the levels between ("inner"), source and target ("ends"), or all. The path method's
    frames between are blends and no finished images; they are read all the same.
    """

    def __init__(self, root: Path, *, frames: Literal["inner", "ends", "all"] = "all"):
        self.root, self._frames = root, frames

    def records(self) -> list[PatchRecord]:
        """Every chosen frame, sorted by id. UserError for a damaged folder, one without sequences, .npy frames (of
        other than three channels) and for soft labels over other classes than the two ends."""
        header, found = read_header(self.root), []
        ends = [header.classes.index(header.source), header.classes.index(header.target)]
        for frame in iter_frames(self.root):
            is_end = frame.level in (0.0, 1.0)
            if self._frames != "all" and is_end != (self._frames == "ends"):
                continue
            if not frame.file.endswith(".png"):
                raise UserError(f"{self.root}, {frame.file}: training reads RGB frames (.png) only")
            source, target = (frame.soft_label[end] for end in ends)
            if source + target < 1 - 1e-3:
                raise UserError(
                    f"{self.root}, manifest, line {frame.line}: a soft label over other classes than {header.source} "
                    f"and {header.target} is no score; train on these two alone"
                )
            label = header.target if target > source else header.source
            found.append(
                PatchRecord(
                    frame.file, self.root / frame.file, label, "train", frame.source_id, float(target), header.mpp
                )
            )
        if not found:
            raise UserError(f"{self.root}: holds no whole sequence with {self._frames} frames")
        self._reading = f"read as a trajectory: {len(found)} frames of {header.source} to {header.target}"
        return sorted(found, key=lambda record: record.id)

    def reading(self) -> list[str]:
        return [self._reading]

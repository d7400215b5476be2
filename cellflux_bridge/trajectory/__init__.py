"""The core data format. Whatever makes sequences writes Trajectories; whatever judges or shows them reads Trajectories
and never sees a network."""

from cellflux_bridge.trajectory.export import export_cellflow
from cellflux_bridge.trajectory.header import (
    HEADER,
    Trajectory,
    TrajectoryHeader,
    between,
    linear_soft_labels,
    read_header,
)
from cellflux_bridge.trajectory.manifest import MANIFEST
from cellflux_bridge.trajectory.reader import (
    count_incomplete,
    iter_frames,
    iter_trajectory,
    load_trajectory,
    read_source_ids,
)
from cellflux_bridge.trajectory.writer import TrajectoryWriter

__all__ = [
    "HEADER",
    "MANIFEST",
    "Trajectory",
    "TrajectoryHeader",
    "TrajectoryWriter",
    "between",
    "count_incomplete",
    "export_cellflow",
    "iter_frames",
    "iter_trajectory",
    "linear_soft_labels",
    "load_trajectory",
    "read_header",
    "read_source_ids",
]

"""Sequences in the layout of Cellflow's release (main_transflow.py), for whatever reads that.

    <output>/<source>_<target>/
        source.npy, target.npy   (N, 3, H, W) float32 in [-1, 1]; (N, K, 3, H, W) uint8, frames 1..K
        diffway.npy              (N, K) int64, depths in respaced steps
        source_img/              source_batch<n>_img0000.png
        target_img/              <source>-<target>_batch<n>_img0000_step<depth>.png

Departs: pictures are PNG, not JPEG; a trajectory holds no latents (latent.npy, latent_img/); methods other than "ddim"
have the number of the level, 1..K, for a depth.
"""

import shutil
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import reserved, safe_name
from cellflux_bridge.images import write_png
from cellflux_bridge.trajectory.header import read_header
from cellflux_bridge.trajectory.reader import iter_trajectory, load_trajectory, read_source_ids


def export_cellflow(folder: Path, output: Path) -> Path:
    """Write the sequences of a trajectory folder below `output`, in the run's order; returns the new folder.

    Raises UserError where the new folder exists, for frames that are not RGB and for a folder without sequences.
    """
    header = read_header(folder)
    num, num_levels = len(read_source_ids(folder)), len(header.levels) - 1
    written = output / safe_name(f"{header.source}_{header.target}", room=4)
    temporary, prefix = written.with_name(written.name + ".tmp"), safe_name(f"{header.source}-{header.target}", room=40)
    if written.exists():
        raise UserError(f"{written}: is there already; remove it, or choose another --output")
    channels, height, width = load_trajectory(folder, num=1).frames.shape[2:]
    if channels != 3:
        raise UserError(f"{folder}: frames of {channels} channels; Cellflow's layout is for RGB images only")
    shutil.rmtree(temporary, ignore_errors=True)  # what a stopped export left
    if temporary.is_symlink():
        temporary.unlink()
    for name in ("source_img", "target_img"):
        (temporary / name).mkdir(parents=True)
    sources, targets, depths = (
        reserved(temporary / f"{name}.npy", dtype, (num, *shape))
        for name, dtype, shape in (
            ("source", np.float32, (3, height, width)),
            ("target", np.uint8, (num_levels, 3, height, width)),
            ("diffway", np.int64, (num_levels,)),
        )
    )
    depths[:] = np.arange(1, num_levels + 1)
    for n, (part, b) in enumerate((p, b) for p in iter_trajectory(folder) for b in range(len(p.source_ids))):
        sources[n], targets[n] = part.frames[0, b] / 127.5 - 1, part.frames[1:, b]
        if header.method == "ddim" and part.depths is not None and not np.isnan(part.depths[:, b]).any():
            depths[n] = part.depths[1:, b]
        source, *frames = part.sequence(b)
        write_png(temporary / "source_img" / f"source_batch{n:04d}_img0000.png", source)
        for depth, frame in zip(depths[n], frames, strict=True):
            write_png(temporary / "target_img" / f"{prefix}_batch{n:04d}_img0000_step{depth:04d}.png", frame)
    temporary.rename(written)
    return written

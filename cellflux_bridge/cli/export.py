"""`cellflux-bridge export`"""

import argparse

from cellflux_bridge.cli.places import trajectory_folder


def run(args: argparse.Namespace) -> None:
    """export TRAJECTORY_OR_RUN: copy the sequences into folders and arrays as Cellflow's release has them."""
    from cellflux_bridge.trajectory import export_cellflow

    folder = trajectory_folder(args.config)
    print(f"wrote: {export_cellflow(folder, args.output or folder / 'cellflow')}")

"""`cellflux-bridge video`"""

import argparse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration, tell_written, trajectory_folder


def run(args: argparse.Namespace) -> None:
    """video TRAJECTORY_OR_RUN: show the sequences as mp4, WebP, GIF or strip."""
    from pydantic import ValidationError

    from cellflux_bridge.config import parse_overrides
    from cellflux_bridge.config.schema import explain
    from cellflux_bridge.trajectory import load_trajectory
    from cellflux_bridge.video.encode import write_all
    from cellflux_bridge.video.settings import VideoConfig

    folder = trajectory_folder(args.config)
    if (folder / "config.yaml").exists():
        settings = configuration(folder, args.overrides).video
    else:
        try:  # frames of the user's own, which no configuration made
            settings = VideoConfig.model_validate(parse_overrides(args.overrides).get("video", {}))
        except ValidationError as error:
            raise UserError(explain(error, VideoConfig, prefix="video")) from error
    trajectory = load_trajectory(folder, num=settings.sequences)
    tell_written(write_all(trajectory, args.output or folder, settings))

"""`cellflux-bridge config show`"""

import argparse

from cellflux_bridge.cli.places import (
    configuration,
)


def run(args: argparse.Namespace) -> None:
    """config show CONFIG_OR_RUN: print the complete configuration, defaults and overrides filled in."""
    config = configuration(args.config, args.overrides)
    if args.key is None:
        print(config.to_yaml(), end="")
    else:
        print(config.value(args.key))

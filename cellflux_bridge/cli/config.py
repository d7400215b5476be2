"""`cellflux-bridge config show`"""

import argparse

from cellflux_bridge.cli.places import configuration


def run(args: argparse.Namespace) -> None:
    """config show CONFIG_OR_RUN: print the complete configuration, with defaults and overrides."""
    from cellflux_bridge.config.schema import dump_yaml

    config = configuration(args.config, args.overrides)
    value = args.key and config.value(args.key)
    text = dump_yaml(value) if isinstance(value, dict) else f"{value}\n"
    print(config.to_yaml() if args.key is None else text, end="")

"""`cellflux-bridge data check`"""

import argparse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import (
    configuration,
)


def run(args: argparse.Namespace) -> None:
    """data check CONFIG: count, measure and look through the patches, and decode them into the cache."""
    from cellflux_bridge.data.check import check_data
    from cellflux_bridge.data.patches import load_patches

    config = configuration(args.config, args.overrides)
    sheet = args.output or config.output / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    report, usable = check_data(config.data, seed=config.seed, sheet=sheet)
    print(report)
    if not usable:
        raise UserError("some files cannot be used (listed above): mend or remove them")
    load_patches(config.data, seed=config.seed)
    print("the cache is filled: training can start")

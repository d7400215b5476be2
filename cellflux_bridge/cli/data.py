"""`cellflux-bridge data check`"""

import argparse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import (
    configuration,
)


def run(args: argparse.Namespace) -> None:
    """data check CONFIG: count, measure and look through the patches, and decode them into the cache."""
    from cellflux_bridge.data.check import check_data, require_pairs
    from cellflux_bridge.data.patches import load_patches

    config = configuration(args.config, args.overrides)
    sheet = args.output or config.output / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    report, usable = check_data(config.data, seed=config.seed, sheet=sheet)
    print(report)
    if not usable:
        raise UserError("some files cannot be used, or a class lacks patches (listed above): mend that first")
    patches, by_level = load_patches(config.data, seed=config.seed), config.condition.target == "level"
    require_pairs(patches, pairs=config.pairs, data=config.data, by_level=by_level, seed=config.seed)
    print("the cache is filled: training can start")

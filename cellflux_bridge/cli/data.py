"""`cellflux-bridge data check` and `data prepare`"""

import argparse
from pathlib import Path

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration

# Files of each class in which nuclei are measured.
_MEASURED = 8


def _nuclei(config) -> list[str]:
    """How wide nuclei are, and which crop suits them."""
    import numpy as np

    from cellflux_bridge.base.seeds import numpy_generator
    from cellflux_bridge.cellularity.proposal import propose_crop
    from cellflux_bridge.data.index import patch_index

    index, files = patch_index(config.data, seed=config.seed), []
    for number, label in enumerate(index.classes):
        members = np.flatnonzero(index.labels == number)
        files += [index.file(i) for i in numpy_generator(0, "nuclei", label).permutation(members)[:_MEASURED]]
    try:
        return propose_crop(files, image_size=config.data.image_size, crop=config.data.crop)
    except UserError:  # an unreadable file, which the report has named
        return []


def run(args: argparse.Namespace) -> None:
    """data check CONFIG: say how the patches were read and what is wrong with them; fill the cache."""
    from cellflux_bridge.data.check import check_data, require_pairs
    from cellflux_bridge.data.pairs import left_out
    from cellflux_bridge.data.patches import load_patches
    from cellflux_bridge.data.soft_labels import soft_labels
    from cellflux_bridge.flow.levels import assign_folds
    from cellflux_bridge.flow.task import build_flow

    config = configuration(args.config, args.overrides)
    sheet = args.output or config.output / "contact_sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    report, usable = check_data(config.data, seed=config.seed, sheet=sheet)
    print(report)
    for line in _nuclei(config) if config.data.channels == 3 else ():
        print(line)
    if not usable:
        raise UserError("some files cannot be used, or a class lacks patches (listed above): mend that first")
    patches, level = load_patches(config.data, seed=config.seed), config.condition.level
    if config.condition.target == "level" and level == "crossfit":
        assign_folds(patches, num_folds=config.classifier.folds, seed=config.seed)
    elif config.condition.target == "level":
        needed = [*patches.indices("train"), *patches.indices("val")]
        soft_labels(patches, level, needed=needed, key="condition.level")
    if unmatched := require_pairs(patches, config, batch_size=1):
        print(left_out(unmatched))
    try:
        require_pairs(patches, config, batch_size=config.train.batch_size)
        names = {"classes": list(patches.classes), "batches": list(patches.batch_names) or None}
        data = config.data.model_copy(update=names)
        build_flow(config.model_copy(update={"data": data}))
    except UserError as error:
        raise UserError(f"the cache is filled; before training mend this: {error}") from error
    print("the cache is filled: training can start")


def prepare(args: argparse.Namespace) -> None:
    """data prepare NAME SRC OUT: write the manifest of a published data set's own download; --list names them."""
    from cellflux_bridge.data import published
    from cellflux_bridge.data.published.base import prepare

    if args.list:
        print(published.listing())
        return
    if args.config is None or len(args.overrides) != 2:
        raise UserError(f"data prepare: expected NAME SRC OUT; names:\n{published.listing()}")
    source, out = map(Path, args.overrides)
    entry, counts, split = published.find(args.config), args.allow_other_counts, args.published_split
    print(*prepare(entry, source, out, table=args.table, other_counts=counts, published_split=split), sep="\n")

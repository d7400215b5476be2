"""`cellflux-bridge perturbations`"""

import argparse
from pathlib import Path

from cellflux_bridge.base.errors import UserError

# Cells that are made again under another condition.
_NUM_SWAPPED = 64


def run(args: argparse.Namespace) -> None:
    """perturbations RUN: make treated cells from controls of their batch, and compare them with real ones."""
    import numpy as np

    from cellflux_bridge.api import Bridge
    from cellflux_bridge.base.files import run_of
    from cellflux_bridge.base.seeds import numpy_generator
    from cellflux_bridge.metrics import perturbation as protocol
    from cellflux_bridge.metrics import perturbation_files as files
    from cellflux_bridge.metrics.loading import cell_extractor
    from cellflux_bridge.translation.perturbation import (
        control_class,
        make_swapped,
        make_treated,
        match_controls,
        some_of_each_batch,
        training_cells,
    )

    if args.num is not None and args.num < 1:
        raise UserError(f"--num {args.num}: expected at least 1")
    runs = [Path(args.config), *(args.beside or [])]
    names = [run_of(run).resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"--beside: two runs are called {max(names, key=names.count)!r}; rename one of their folders")
    bridges = [Bridge.load(run, args.overrides, trust=args.trust) for run in runs]
    first, output = bridges[0], args.output or runs[0] / "perturbations"
    patches, config, channels = first.patches(), first.config, first.preprocessing.channels
    for name, bridge in zip(names, bridges, strict=True):
        _require_same(patches, bridge.patches(), name)
    if not 0 <= args.dna < channels:
        raise UserError(f"--dna {args.dna}: the cells have channels 0 to {channels - 1}")
    in_root = config.data.root.expanduser() / "moa.csv"
    table = args.moa or (in_root if in_root.is_file() else None)
    moa = files.read_moa(table, patches.classes) if table else {}
    control = control_class(first)
    perturbations = [label for label in patches.classes if label != control]
    targets = [label for label in perturbations if all(bridge.can_make(label) for bridge in bridges)]
    others = [label for label in perturbations if label not in targets]
    how = {"split": args.split, "num": args.num, "pairs": config.pairs, "seed": config.seed}
    matched = match_controls(patches, control, targets, **how)
    treated, controls = matched.treated, matched.control
    as_many, fitted = training_cells(patches, treated, seed=config.seed)
    extractors = {"profile": protocol.Profile(patches.centre(fitted).numpy())}
    for name in args.features or ():
        extractors[name] = cell_extractor(name, channels=channels, device=first.fabric.device)

    def cells(of: np.ndarray, pixels: np.ndarray | None = None, made_from: np.ndarray | None = None) -> protocol.Cells:
        """Real cells with their features, or `pixels` that stand for them and come from other cells."""
        pixels = patches.centre(of).numpy() if pixels is None else pixels
        features = {name: extract(pixels) for name, extract in extractors.items()}
        origins = of if made_from is None else made_from
        return protocol.Cells(pixels, patches.labels[of], patches.batches[of], patches.doses[of], origins, features)

    made = {}
    for name, bridge in zip(names, bridges, strict=True):
        made[name] = cells(treated, make_treated(bridge, patches, matched, output / "made" / name), controls)
    test, untreated = cells(treated), cells(treated, patches.centre(controls).numpy(), controls)
    beside = {} if args.split == "train" or not len(as_many) else {files.REAL: cells(as_many)}
    some = some_of_each_batch(patches, patches.indices(args.split, control))
    columns = patches.labels[some], patches.batches[some], patches.doses[some], some
    compared = protocol.Protocol(
        train=cells(fitted),
        test=test,
        controls=protocol.Cells(patches.centre(some).numpy(), *columns),
        unseen=[patches.class_index(label) for label in config.data.split.unseen],
        moa=moa,
        dna=args.dna,
        seed=config.seed,
    )
    rows = compared.rows({**beside, files.CONTROLS: untreated, **made})
    again = numpy_generator(config.seed, "perturbations", "swapped").permutation(len(treated))[:_NUM_SWAPPED]
    for name, bridge in zip(names, bridges, strict=True):
        differ, swapped = make_swapped(bridge, patches, matched, again)
        if len(differ):
            sides = made[name].images[differ], swapped, untreated.images[differ]
            rows += protocol.swap_rows(name, *sides, seed=config.seed)
    labels = {number: patches.classes[number] for number in np.unique(test.labels).tolist()}
    drawn = files.draw(output, labels, test, {files.CONTROLS: untreated, **made})
    written = files.write(rows, _notes(config, matched, others), output, name=", ".join(names), drawn=drawn)
    print(written[-1].read_text(encoding="utf-8"))
    for path in written:
        print(f"wrote: {path}")


def _require_same(patches, other, name: str) -> None:
    import numpy as np

    keys = ("ids", "classes", "batch_names", "preprocessing")
    differing = [key for key in keys if getattr(other, key) != getattr(patches, key)]
    if not differing and not np.array_equal(other.splits, patches.splits):
        differing = ["splits"]
    if differing:
        raise UserError(f"--beside: {name} knows other {' and '.join(differing)}; compare runs of one data set")


def _notes(config, matched, others) -> list[str]:
    from cellflux_bridge.base.errors import abbreviate
    from cellflux_bridge.metrics.perturbation_files import NOTES, PLATE

    found = [PLATE[config.pairs.match_batch], *NOTES]
    found += [
        f"{len(set(matched.control.tolist()))} different controls stand for {len(matched.treated)} treated cells."
    ]
    if matched.left_out:
        found.append(f"{matched.left_out} treated cells without a control in their batch were left out.")
    if others:
        found.append(f"left out, because a network here cannot make them: {abbreviate(others, limit=20)}.")
    unseen = config.data.split.unseen
    return [*found, *([f"unseen: no training saw {abbreviate(unseen, limit=20)}."] if unseen else [])]

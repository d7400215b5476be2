"""`cellflux-bridge perturbations`"""

import argparse
from pathlib import Path

from cellflux_bridge.base.errors import UserError

# Real training cells that regressions are fitted to, and cells that are made again under another condition.
_MOST_TRAINED, _NUM_SWAPPED = 20_000, 64


def run(args: argparse.Namespace) -> None:
    """perturbations RUN: make treated cells from controls of their batch, and compare them with real ones."""
    import numpy as np

    from cellflux_bridge.api import Bridge
    from cellflux_bridge.base.files import run_of
    from cellflux_bridge.base.seeds import numpy_generator
    from cellflux_bridge.metrics import perturbation as protocol
    from cellflux_bridge.metrics import perturbation_files as files
    from cellflux_bridge.metrics.loading import cell_extractor
    from cellflux_bridge.translation.perturbation import control_class, make_swapped, make_treated, match_controls

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
    beside = config.data.root.expanduser() / "moa.csv"
    table = args.moa or (beside if beside.is_file() else None)
    moa = files.read_moa(table, patches.classes) if table else {}
    control = patches.class_index(control_class(first))
    train = patches.indices("train")
    train = numpy_generator(config.seed, "perturbations", "training cells").permutation(train)
    train = train[patches.labels[train] != control][:_MOST_TRAINED]
    extractors = {"profile": protocol.Profile(patches.centre(train).numpy())}
    for name in args.features or ():
        extractors[name] = cell_extractor(name, channels=channels, device=first.fabric.device)
    matched = match_controls(patches, patches.classes[control], split=args.split, num=args.num, seed=config.seed)
    treated, controls = matched.treated, matched.control

    def cells(of: np.ndarray, pixels: np.ndarray | None = None) -> protocol.Cells:
        """Real cells, or `pixels` that stand for them, with their features."""
        pixels = patches.centre(of).numpy() if pixels is None else pixels
        features = {name: extract(pixels) for name, extract in extractors.items()}
        return protocol.Cells(pixels, patches.labels[of], patches.batches[of], patches.doses[of], features)

    made = {}
    for name, bridge in zip(names, bridges, strict=True):
        made[name] = cells(treated, make_treated(bridge, patches, matched, output / "made" / name))
    counts = zip(*np.unique(patches.labels[treated], return_counts=True), strict=True)
    as_many = np.concatenate([train[patches.labels[train] == c][:num] for c, num in counts])
    test, untreated = cells(treated), cells(treated, patches.centre(controls).numpy())
    compared = protocol.Protocol(
        train=cells(train),
        test=test,
        controls=cells(patches.indices(args.split, patches.classes[control])),
        unseen=[patches.class_index(label) for label in config.data.split.unseen],
        moa=moa,
        dna=args.dna,
        seed=config.seed,
    )
    rows = compared.rows({files.REAL: cells(as_many), files.CONTROLS: untreated, **made})
    again = numpy_generator(config.seed, "perturbations", "swapped").permutation(len(treated))[:_NUM_SWAPPED]
    for name, bridge in zip(names, bridges, strict=True):
        swapped = make_swapped(bridge, patches, matched, again)
        sides = made[name].images[again], swapped, untreated.images[again]
        rows += protocol.swap_rows(name, *sides, seed=config.seed)
    labels = {number: patches.classes[number] for number in np.unique(test.labels).tolist()}
    drawn = files.draw(output, labels, test, {files.CONTROLS: untreated, **made})
    written = files.write(rows, _notes(config), output, name=", ".join(names), drawn=drawn)
    print(written[-1].read_text(encoding="utf-8"))
    for path in written:
        print(f"wrote: {path}")


def _require_same(patches, other, name: str) -> None:
    import numpy as np

    same = all(
        getattr(other, key) == getattr(patches, key) for key in ("ids", "classes", "batch_names", "preprocessing")
    )
    if not (same and np.array_equal(other.splits, patches.splits)):
        raise UserError(f"--beside: {name} knows other cells, splits, classes or sizes; compare runs of one data set")


def _notes(config) -> list[str]:
    from cellflux_bridge.metrics.perturbation_files import NOTES

    unseen = config.data.split.unseen
    return [*NOTES, *([f"unseen: no training saw {', '.join(unseen)}."] if unseen else [])]

"""PanNuke: patches of 19 tissues in three folds, from NumPy files."""

from collections.abc import Iterator
from functools import partial

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.published.base import Download, Patch, Published, require_stack, write_image

_SPLITS = ("train", "val", "test")


def _read(download: Download) -> Iterator[Patch]:
    for fold, split in enumerate(_SPLITS, 1):
        folder = f"Fold {fold}/images/fold{fold}"
        types, name = download.npy(f"{folder}/types.npy"), f"{folder}/images.npy"
        if types.ndim != 1 or types.dtype.kind != "U":
            raise UserError(f"{folder}/types.npy: {types.dtype} of shape {types.shape}; expected a text for each image")
        stack = require_stack(download.npy(name), name=name, length=len(types))
        for index, tissue in enumerate(types.tolist()):
            write = partial(write_image, stack, index, name)
            yield Patch(f"patches/fold{fold}/{index:04d}.png", tissue, split, mpp=0.25, write=write)


DATASET = Published(
    title="PanNuke: 19 tissues, 256 px at 40x; written as PNG",
    source="https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke",
    licence="CC BY-NC-SA 4.0",
    citation="Gamper et al. 2020, arXiv 2003.10778; Gamper et al. 2019, ECDP",
    tree="  SRC/Fold 1/images/fold1/images.npy, SRC/Fold 1/images/fold1/types.npy\n  SRC/Fold 2/..., SRC/Fold 3/...",
    read=_read,
    counts={"all": 7901, "train": 2656, "val": 2523, "test": 2722},
    note="folds 1, 2, 3 become train, val, test; masks are not read",
    unconfirmed="which patches are one slide's: no such id is published",
)

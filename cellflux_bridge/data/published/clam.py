"""Patches that CLAM has saved: an HDF5 file for each slide."""

from collections.abc import Iterator
from functools import partial

from cellflux_bridge.base.files import safe_name
from cellflux_bridge.data.published.base import Download, Patch, Published, require_stack, write_image

_NO_PIXELS = (
    "CLAM's fast pipeline saves coordinates only: make the patches with its create_patches.py, which saves pixels, or "
    "cut tiles into a folder for each slide and prepare them as stamp"
)


def _read(download: Download) -> Iterator[Patch]:
    for _, row in download.table():
        slide, name = row["slide_id"], f"patches/{row['slide_id']}.h5"
        stack = require_stack(download.hdf5(name, "imgs", without=_NO_PIXELS), name=name)
        for index in range(len(stack)):
            path = f"patches/{safe_name(slide)}/{index:06d}.png"
            write = partial(write_image, stack, index, name)
            yield Patch(path, row["label"], group=row["case_id"], write=write)


DATASET = Published(
    title="CLAM: your own slides' patches, an HDF5 file for each slide; labels from --table; written as PNG",
    source="your own slides; https://github.com/mahmoodlab/CLAM",
    licence="your own",
    citation="Lu et al. 2021, Nature Biomedical Engineering 5",
    tree="  SRC/patches/<slide_id>.h5 ... (imgs and coords, as create_patches.py saves them)",
    read=_read,
    groups="case_id",
    table=("case_id", "slide_id", "label"),
    note="that is CLAM's own table of a data set",
)

"""BRACS: regions of interest of breast lesions, seven classes."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from cellflux_bridge.data.published.base import Download, Patch, Published, match

_CLASSES = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
_COUNTS = {
    "train": (357, 714, 389, 624, 387, 665, 521),
    "val": (46, 43, 46, 49, 41, 40, 47),
    "test": (81, 79, 82, 83, 79, 85, 81),
}
_NAME = re.compile(r"^(BRACS_\d+)_[A-Z]+_\d+\.png$")


def _read(download: Download) -> Iterator[Patch]:
    for split in ("train", "val", "test"):
        folders = {f"{number}_{label}": label for number, label in enumerate(_CLASSES)}
        for path, label in download.class_folders(split, folders):
            slide = match(_NAME, PurePosixPath(path).name, expected="BRACS_<slide>_<type>_<number>.png")
            yield Patch(path, label, split, group=slide[1])


DATASET = Published(
    title="BRACS: breast lesions, regions of interest, seven classes from normal to invasive",
    source="https://www.bracs.icar.cnr.it (after registration), RoI set",
    licence="CC BY-NC 4.0",
    citation="Brancati et al. 2022, Database, doi 10.1093/database/baac093",
    tree="  SRC/train/0_N/BRACS_<slide>_N_<number>.png ... (0_N 1_PB 2_UDH 3_FEA 4_ADH 5_DCIS 6_IC)\n"
    "  SRC/val/..., SRC/test/... (SRC is the folder latest_version)",
    read=_read,
    classes=_CLASSES,
    counts={
        **{"train": 3657, "val": 312, "test": 570},
        **{f"{split}/{c}": num for split in _COUNTS for c, num in zip(_CLASSES, _COUNTS[split], strict=True)},
    },
    groups="slide",
    note="the published split is one by patient. A split of your own may part a patient's slides: patients stand in an "
    ".xlsx that is not read",
    unconfirmed="the numbers of single classes (their sums are the published ones) and the licence, from users' pages",
)

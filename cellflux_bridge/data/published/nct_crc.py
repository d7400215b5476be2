"""NCT-CRC-HE-100K and CRC-VAL-HE-7K: colorectal tissue of nine classes."""

from collections.abc import Iterator

from cellflux_bridge.data.published.base import Download, Patch, Published

_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
_TRAIN = (10407, 10566, 11512, 11557, 8896, 13536, 8763, 10446, 14317)
_TEST = (1338, 847, 339, 634, 1035, 592, 741, 421, 1233)


def _read(download: Download) -> Iterator[Patch]:
    for split, folder in (("train", "NCT-CRC-HE-100K"), ("test", "CRC-VAL-HE-7K")):
        for path, label in download.class_folders(folder, {name: name for name in _CLASSES}):
            yield Patch(path, label, split, mpp=0.5)


DATASET = Published(
    title="NCT-CRC-HE-100K with CRC-VAL-HE-7K: colorectal tissue, nine classes, 224 px",
    source="https://doi.org/10.5281/zenodo.1214456",
    licence="CC BY 4.0",
    citation="Kather et al. 2018, doi 10.5281/zenodo.1214456",
    tree="  SRC/NCT-CRC-HE-100K/ADI/*.tif ... (ADI BACK DEB LYM MUC MUS NORM STR TUM)\n"
    "  SRC/CRC-VAL-HE-7K/... likewise",
    read=_read,
    classes=_CLASSES,
    counts={
        **{"train": 100_000, "test": 7180},
        **{f"train/{label}": num for label, num in zip(_CLASSES, _TRAIN, strict=True)},
        **{f"test/{label}": num for label, num in zip(_CLASSES, _TEST, strict=True)},
    },
    note="JPEG quality and colour differ by class (arXiv 2409.11546); which images are one patient's is not published, "
    "only that the 7K come from other patients",
    unconfirmed="the numbers of single classes (their sums are the published 100,000 and 7,180)",
)

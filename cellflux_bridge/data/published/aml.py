"""AML-Cytomorphology_LMU: single white blood cells of 15 classes."""

from collections.abc import Iterator

from cellflux_bridge.data.published.base import Download, Patch, Published

_COUNTS = {
    **{"BAS": 79, "EBO": 78, "EOS": 424, "KSC": 15, "LYA": 11, "LYT": 3937, "MMZ": 15, "MOB": 26, "MON": 1789},
    **{"MYB": 42, "MYO": 3268, "NGB": 109, "NGS": 8484, "PMB": 18, "PMO": 70},
}


def _read(download: Download) -> Iterator[Patch]:
    return (Patch(path, label) for path, label in download.class_folders(".", {name: name for name in _COUNTS}))


DATASET = Published(
    title="AML-Cytomorphology_LMU: single white blood cells of leukaemia patients and controls, 15 classes",
    source="https://doi.org/10.7937/tcia.2019.36f5o9ld (The Cancer Imaging Archive)",
    licence="CC BY 3.0",
    citation="Matek et al. 2019, Nature Machine Intelligence 1",
    tree="  SRC/BAS/*.tiff\n  SRC/EBO/*.tiff ... (15 folders; SRC is the innermost AML-Cytomorphology_LMU)",
    read=_read,
    classes=tuple(_COUNTS),
    counts={"all": 18365, **_COUNTS},
    unconfirmed="the numbers of single classes (the sum is the published one) and the licence, both from users' pages; "
    "which cells are one patient's is not published",
)

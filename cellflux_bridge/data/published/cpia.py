"""CPIA and CPIA-Mini: images of many data sets without labels of their own."""

from collections.abc import Iterator

from cellflux_bridge.data.published.base import Download, Patch, Published

_SCALES = ("XL", "L", "M", "S")


def _read(download: Download) -> Iterator[Patch]:
    if not (scales := [scale for scale in _SCALES if scale in download.folders()]):
        download.fail("no folder of a scale (L, M, S)")
    for scale in scales:
        for name in download.folders(scale):
            yield from (Patch(path, name) for path in download.images(f"{scale}/{name}"))


DATASET = Published(
    title="CPIA, CPIA-Mini: standardised images of many data sets; the class is the data set they come from",
    source="https://github.com/zhanglab2021/CPIA_Dataset",
    licence="that of each data set in it",
    citation="Ying et al. 2025, Biomedical Signal Processing and Control 110; arXiv 2310.17902",
    tree="  SRC/L/<data set>/*.jpg ...\n  SRC/M/... and SRC/S/... likewise (one scale is enough)",
    read=_read,
    note="made for pre-training: it names no diagnoses",
    unconfirmed="the tree inside the scales' archives, and what their file names say of slides; numbers are not "
    "checked, since versions differ (3.4 to 149 million images)",
)

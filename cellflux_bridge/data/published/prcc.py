"""pRCC: papillary renal cell carcinoma, type 1 and type 2."""

import re
from collections.abc import Iterator

from cellflux_bridge.data.published.base import Download, Patch, Published

_LABELS = {"1": "type 1", "2": "type 2"}
_PATIENT = re.compile(r"TCGA-\w{2}-\w{4}")


def _read(download: Download) -> Iterator[Patch]:
    for path, label in download.class_folders(".", _LABELS):
        _, slide, *image = path.split("/")
        if not image:
            download.fail(f"{path}: lies in no slide's folder")
        patient = _PATIENT.match(slide)
        yield Patch(path, label, group=patient[0] if patient else slide)


DATASET = Published(
    title="pRCC: papillary renal cell carcinoma, type 1 and type 2, regions of 2000 px from TCGA",
    source="https://dataset.chenli.group/home/prcc-subtyping (1.zip and 2.zip)",
    licence="not confirmed: see its page",
    citation="Gao et al. 2021, MICCAI, arXiv 2106.12265",
    tree="  SRC/1/TCGA-2Z-A9J6-01Z-00-DX1.<id>/15503_16966_2000.png ...\n  SRC/2/<slide>/...",
    read=_read,
    classes=tuple(_LABELS.values()),
    groups="TCGA patient, of whom there may be several slides",
    unconfirmed="the number of images: the paper has 1,162 regions of 171 slides, the lists of its code have more, so "
    "no number is checked; and the licence",
)

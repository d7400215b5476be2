"""PatchCamelyon: lymph node patches with and without metastasis, from HDF5 files."""

from collections.abc import Iterator
from functools import partial

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.published.base import Download, Patch, Published, require_stack, write_image

_CLASSES = ("normal", "tumor")


def _read(download: Download) -> Iterator[Patch]:
    for split, word in (("train", "train"), ("val", "valid"), ("test", "test")):
        name = f"camelyonpatch_level_2_split_{word}_{{}}"
        labels = download.hdf5(name.format("y.h5"), "y")[()].ravel()
        stack = require_stack(download.hdf5(name.format("x.h5"), "x"), name=name.format("x.h5"), length=len(labels))
        slides = [row["wsi"] for _, row in download.rows(name.format("meta.csv"), "wsi")]
        if len(slides) != len(labels):
            raise UserError(
                f"{name.format('meta.csv')}: {len(slides)} rows, but {len(labels)} labels; download it again"
            )
        for index, (label, slide) in enumerate(zip(labels.tolist(), slides, strict=True)):
            if label not in (0, 1):
                raise UserError(f"{name.format('y.h5')}, item {index}: label {label}; expected 0 or 1")
            path = f"patches/{split}/{index // 1000:03d}/{index:06d}.png"
            write = partial(write_image, stack, index, name.format("x.h5"))
            yield Patch(path, _CLASSES[label], split, group=slide, mpp=0.972, write=write)


DATASET = Published(
    title="PatchCamelyon: lymph nodes without (normal) and with (tumor) metastasis, 96 px; written as PNG",
    source="https://github.com/basveeling/pcam",
    licence="CC0",
    citation="Veeling et al. 2018, arXiv 1806.03962; Ehteshami Bejnordi et al. 2017, JAMA 318(22)",
    tree="  SRC/camelyonpatch_level_2_split_train_x.h5, ..._train_y.h5, ..._train_meta.csv\n"
    "  and the same for valid and test (unpack the .gz files first)",
    read=_read,
    classes=_CLASSES,
    counts={"train": 262_144, "val": 32_768, "test": 32_768},
    groups="slide (wsi of the meta files)",
    note="tumor means tumour in the centre of 32 px; mpp is 4 x 0.243, the published scale at 10x",
)

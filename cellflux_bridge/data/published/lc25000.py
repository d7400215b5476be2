"""LC25000: lung and colon, 25,000 images that are turned and mirrored copies of about 1,250 tiles."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.published.base import Download, Patch, Published

_FOLDERS = {
    "lung_image_sets": ("lung_n", "lung_aca", "lung_scc"),
    "colon_image_sets": ("colon_n", "colon_aca"),
}
_CLASSES = sum(_FOLDERS.values(), ())


def _read(download: Download) -> Iterator[Patch]:
    groups = {row["filename"]: row["group_id"] for _, row in download.table()}
    for folder, classes in _FOLDERS.items():
        for path, label in download.class_folders(folder, {name: name for name in classes}):
            if not (group := groups.get(PurePosixPath(path).name)):
                raise UserError(f"{download.root / path}: --table names no group of it; every image needs one")
            yield Patch(path, label, group=group)


DATASET = Published(
    title="LC25000: lung (benign, adenocarcinoma, squamous) and colon (benign, adenocarcinoma), 768 px",
    source="https://github.com/tampapath/lung_colon_image_set",
    licence="free for AI researchers, as its authors say",
    citation="Borkowski et al. 2019, arXiv 1912.12142; groups: Batchkala et al. 2024, DEMI at MICCAI",
    tree="  SRC/lung_image_sets/lung_n/*.jpeg, lung_aca, lung_scc\n  SRC/colon_image_sets/colon_n/*.jpeg, colon_aca "
    "(SRC is the folder lung_colon_image_set)",
    read=_read,
    classes=_CLASSES,
    counts=dict.fromkeys(_CLASSES, 5000),
    groups="original tile, of which there are about 20 copies",
    table=("filename", "group_id"),
    note="lc25000_image_groups.csv of https://github.com/GeorgeBatch/LC25000-clean (folder kaggle) names the original "
    "tiles. No way round it: copies are turned by any angle, and the search for near-copies finds 6 % of their pairs",
    unconfirmed="which tiles are one patient's: no such id is published",
)

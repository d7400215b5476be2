"""BreastPathQ: tumour cellularity of breast patches after treatment."""

from collections.abc import Iterator

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.published.base import Download, Patch, Published, number

_BANDS = (("healthy", 0.0), ("low", 0.3), ("medium", 0.7), ("high", 1.0))  # up to and with this cellularity
_PARTS = (
    ("train", "breastpathq/datasets/train", "breastpathq/datasets/train_labels.csv"),
    ("val", "breastpathq/datasets/validation", "breastpathq-test/val_labels.csv"),
)
_RATINGS = ("y", "p1", "p2")


def _read(download: Download) -> Iterator[Patch]:
    for split, folder, table in _PARTS:
        for where, row in download.rows(table, "slide", "rid"):
            ratings = [number(row[name], where=where, high=1) for name in _RATINGS if name in row]
            if not ratings:
                raise UserError(f"{where}: no column y, p1 or p2; found: {', '.join(row)}")
            score = sum(ratings) / len(ratings)
            label = next(name for name, most in _BANDS if score <= most)
            path = f"{folder}/{row['slide']}_{row['rid']}.tif"
            yield Patch(path, label, split, group=row["slide"], score=score, where=where)


DATASET = Published(
    title="BreastPathQ: breast, tumour cellularity 0 to 1, 512 px",
    source="https://breastpathq.grand-challenge.org (after registration)",
    licence="not confirmed: see the challenge's page",
    citation="Petrick et al. 2021, Journal of Medical Imaging 8(3)",
    tree="  SRC/breastpathq/datasets/train_labels.csv (slide,rid,y)\n"
    "  SRC/breastpathq/datasets/train/<slide>_<rid>.tif ..., SRC/breastpathq/datasets/validation/...\n"
    "  SRC/breastpathq-test/val_labels.csv",
    read=_read,
    classes=tuple(name for name, _ in _BANDS),
    counts={"train": 2394, "val": 185},
    groups="slide",
    scores="cellularity, the mean where two pathologists give it",
    note="classes are bands of this program: healthy 0, low to .3, medium to .7, high above",
    unconfirmed="whether val_labels.csv has y, or p1 and p2 (any is read), the licence, and slides of one patient",
)

"""BCI: registered pairs of H&E and HER2 immunohistochemistry."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from cellflux_bridge.data.published.base import Download, Patch, Published, match

_NAME = re.compile(r"^(\d+_(?:train|test))_([0-3])\+?\.png$")


def _read(download: Download) -> Iterator[Patch]:
    pairs = {}
    for stain in ("HE", "IHC"):
        for split in ("train", "test"):
            found = download.images(f"{stain}/{split}")
            pairs.setdefault(split, []).append({PurePosixPath(path).name for path in found})
            for path in found:
                name = match(_NAME, PurePosixPath(path).name, expected="00000_train_1+.png")
                yield Patch(path, stain, split, group=name[1], score=int(name[2]) / 3)
    for split, (he, ihc) in pairs.items():
        if alone := sorted(he ^ ihc):
            download.fail(f"{split}: {len(alone)} images without their pair, as {alone[0]}")


DATASET = Published(
    title="BCI: pairs of H&E (HE) and HER2 immunohistochemistry (IHC), 1024 px",
    source="https://bupt-ai-cz.github.io/BCI (after a form)",
    licence="non-commercial use only (its own terms)",
    citation="Liu et al. 2022, CVPR Workshops, arXiv 2204.11425",
    tree="  SRC/HE/train/00000_train_1+.png ..., SRC/HE/test/...\n  SRC/IHC/train/... and test/..., of the same names",
    read=_read,
    classes=("HE", "IHC"),
    counts={f"{split}/{stain}": num for stain in ("HE", "IHC") for split, num in (("train", 3896), ("test", 977))},
    groups="pair of images",
    scores="HER2 level of the slide: 0, 1/3 (1+), 2/3 (2+), 1 (3+)",
    note="the level is the slide's, not the patch's",
    unconfirmed="which pairs are one slide's (51 slide pairs in all): no such id is published",
)

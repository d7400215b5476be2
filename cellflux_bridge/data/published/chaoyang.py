"""Chaoyang: colon patches of four classes."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.published.base import Download, Patch, Published, match

_CLASSES = ("normal", "serrated", "adenocarcinoma", "adenoma")  # 0 to 3 in the JSON files
_SLIDE = re.compile(r"^(.+)-IMG\d+x\d+-\d", re.IGNORECASE)


def _read(download: Download) -> Iterator[Patch]:
    for split in ("train", "test"):
        for where, item in download.items(f"{split}.json", name=str, label=int):
            if not 0 <= item["label"] < len(_CLASSES):
                raise UserError(f"{where}: label {item['label']}; expected 0 to 3")
            slide = match(_SLIDE, PurePosixPath(item["name"]).name, expected="<slide>-IMG<row>x<column>-<label>.JPG")
            yield Patch(item["name"], _CLASSES[item["label"]], split, group=slide[1], where=where)


DATASET = Published(
    title="Chaoyang: colon, normal, serrated, adenocarcinoma and adenoma, 512 px",
    source="https://bupt-ai-cz.github.io/HSA-NRL (after a form)",
    licence="non-commercial use only, no redistribution (its own terms)",
    citation="Zhu et al. 2021, IEEE TMI, Hard Sample Aware Noise Robust Learning",
    tree="  SRC/train.json, SRC/test.json\n  SRC/train/535940-IMG009x024-2.JPG ...\n  SRC/test/...",
    read=_read,
    classes=_CLASSES,
    counts={
        **{"train": 4021, "train/normal": 1111, "train/serrated": 842, "train/adenocarcinoma": 1404},
        **{"train/adenoma": 664, "test": 2139, "test/normal": 705, "test/serrated": 321},
        **{"test/adenocarcinoma": 840, "test/adenoma": 273},
    },
    groups="slide, the file name up to -IMG",
    note="patches of one slide stand in the published training and test sets",
)

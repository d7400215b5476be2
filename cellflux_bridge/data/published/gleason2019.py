"""Gleason 2019: cores of a tissue microarray with the maps of up to six pathologists, cut into patches."""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.data.published.base import Download, Patch, Published, match
from cellflux_bridge.images import UnreadableImage, read_rgb, read_size, write_png

SIZE = 512
_CLASSES = ("benign", "grade 3", "grade 4", "grade 5")
_NONE, _FOREIGN = len(_CLASSES), len(_CLASSES) + 1
# The class of each value of the maps; 0 is not annotated.
_CLASS_OF = np.full(256, _FOREIGN, np.uint8)
_CLASS_OF[[0, 1, 6, 3, 4, 5]] = _NONE, 0, 0, 1, 2, 3
_CORE = re.compile(r"^(slide\d+_core\d+)(_classimg_nonconvex\.png|\.jpe?g)$", re.IGNORECASE)
_LEAST_SHARE = 0.5


def vote(maps: list[np.ndarray]) -> np.ndarray:
    """The class (H, W) that most maps of classes give a pixel, `_NONE` where none does or two are equal."""
    votes = [sum((one == number).view(np.uint8) for one in maps) for number in range(len(_CLASSES))]
    most = np.maximum.reduce(votes)
    equal = [count == most for count in votes]
    return np.where((most > 0) & (sum(same.view(np.uint8) for same in equal) == 1), np.argmax(equal, axis=0), _NONE)


@lru_cache(maxsize=4)
def _pixels(core: Path) -> np.ndarray:
    return read_rgb(core)


def _cut(core: Path, top: int, left: int, path: Path) -> None:
    write_png(path, np.ascontiguousarray(_pixels(core)[top : top + SIZE, left : left + SIZE]))


def _maps(files: list[Path], core: Path) -> list[np.ndarray]:
    """The class of every pixel, as each pathologist sees it."""
    maps, size = [_CLASS_OF[read_rgb(file)[..., 0]] for file in files], read_size(core)
    for file, one in zip(files, maps, strict=True):
        if one.shape != size or (one == _FOREIGN).any():
            raise UserError(f"{file}: size {one.shape}, or a foreign value; expected {size}, values 0, 1, 3 to 6")
    return maps


def _read(download: Download) -> Iterator[Patch]:
    files: dict[str, list[Path]] = {}
    for name in download.folders():
        for path in download.images(name) if re.fullmatch(r"Maps[1-6]_T", name) else ():
            core = match(_CORE, Path(path).name, expected="slide001_core003_classimg_nonconvex.png")[1]
            files.setdefault(core, []).append(download.file(path))
    for path in progress(download.images("Train Imgs"), desc="maps", unit="core"):
        core = match(_CORE, Path(path).name, expected="slide001_core003.jpg")[1]
        if core not in files:
            continue  # nobody annotated it
        try:
            maps = _maps(files[core], image := download.file(path))
        except UnreadableImage as error:
            raise UserError(f"{error}; unpack the download again") from error
        for top in range(0, maps[0].shape[0] - SIZE + 1, SIZE):
            for left in range(0, maps[0].shape[1] - SIZE + 1, SIZE):
                voted = vote([one[top : top + SIZE, left : left + SIZE] for one in maps])
                shares = np.bincount(voted.ravel(), minlength=_FOREIGN)[:_NONE] / SIZE**2
                if shares.max() >= _LEAST_SHARE:
                    best, name = int(shares.argmax()), f"patches/{core}_{top}_{left}.png"
                    write = partial(_cut, image, top, left)
                    yield Patch(name, _CLASSES[best], group=core, score=best / 3, write=write)


DATASET = Published(
    title=f"Gleason 2019: prostate cores with pathologists' maps, cut into {SIZE} px; benign, grades 3, 4, 5",
    source="https://gleason2019.grand-challenge.org (after registration)",
    licence="not confirmed: see the challenge's page",
    citation="Nir et al. 2018, Medical Image Analysis 50; Karimi et al. 2020, IEEE JBHI",
    tree="  SRC/Train Imgs/slide001_core003.jpg ...\n  SRC/Maps1_T/slide001_core003_classimg_nonconvex.png ...\n"
    "  SRC/Maps2_T to SRC/Maps6_T likewise (not every pathologist saw every core)",
    read=_read,
    classes=_CLASSES,
    groups="core",
    scores="0 benign, 1/3 grade 3, 2/3 grade 4, 1 grade 5",
    note="a pixel's class is that of most maps; a patch needs half of its pixels in one class. Test cores have no maps",
    unconfirmed="that 0 means not annotated and 1 and 6 benign (users of the data read 0 as benign, too), the licence, "
    "and which cores are one patient's: no such id is published",
)

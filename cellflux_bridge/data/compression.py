"""How files are compressed, class by class: a network can tell classes apart by that alone (arXiv 2603.18089)."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin

from cellflux_bridge.base.errors import abbreviate
from cellflux_bridge.images import files_of, stat_of

_CHROMA = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
# Classes differ where a judge that knows one trait alone is right for 60 % of two classes of equal size.
_LEAST_DISTANCE = 0.2
# Samples of n and m differ by more than _CHANCE * sqrt(1/n + 1/m) in one case of 45 (Kolmogorov and Smirnov).
_CHANCE = 1.5


class Encoding(NamedTuple):
    """Codec (of a TIFF also its compression), of a JPEG the quality on libjpeg's scale, 1 to 100, and the chroma
    subsampling, and the file's size in kB."""

    codec: str
    quality: int | None
    chroma: str | None
    size: float


def encoding(path: Path) -> Encoding:
    """How a readable image is compressed, from the header of its first file."""
    codec, quality, chroma = path.suffix[1:].upper(), None, None
    try:
        with Image.open(files_of(path)[0]) as image:
            codec = f"TIFF {image.info.get('compression')}" if image.format == "TIFF" else image.format
            if tables := getattr(image, "quantization", None):
                quality = 1 + int(np.abs(_luminance_tables() - np.array(tables[min(tables)])).sum(1).argmin())
                chroma = "grey" if image.mode == "L" else _CHROMA.get(JpegImagePlugin.get_sampling(image), "other")
    except (OSError, SyntaxError, ValueError):
        pass  # what Pillow does not read: the suffix has to do
    return Encoding(codec, quality, chroma, stat_of(path)[0] / 1000)


@cache
def _luminance_tables() -> np.ndarray:
    """The luminance quantisation tables (100, 64) of libjpeg's qualities 1 to 100."""
    files = [BytesIO() for _ in range(100)]
    for quality, file in enumerate(files, start=1):
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
    return np.array([Image.open(file).quantization[0] for file in files])


def compare(encodings: Sequence[Encoding], labels: Sequence[str]) -> list[str]:
    """A table of the classes' files, and a warning for each trait in which two classes differ.

    The distance of two classes in codec or subsampling is the total variation between their shares, that in quality
    the largest one between their distribution functions; a judge that knows the trait alone is right in
    (1 + distance) / 2 of cases. A warning needs a distance of 0.2, and one that chance does not make of as many files.
    """
    columns = {}  # of each class: codecs, qualities, subsamplings and sizes, where there are such
    for label in sorted(set(labels)):
        members = [e for e, c in zip(encodings, labels, strict=True) if c == label]
        columns[label] = [[value for value in column if value is not None] for column in zip(*members, strict=True)]
    lines = ["files by class: codec; JPEG quality, 5 / 50 / 95 %; chroma subsampling; kB, 5 / 50 / 95 %"]
    width = max(map(len, columns), default=0)
    lines += [f"  {label:<{width}}  " + "; ".join(map(_summary, of)) for label, of in columns.items()]
    for number, name in enumerate(("codec", "JPEG quality", "chroma subsampling")):
        values = {label: of[number] for label, of in columns.items() if of[number]}
        pairs = [(*_distance(values[a], values[b]), a, b) for a, b in combinations(values, 2)]
        excess, distance, a, b = max(pairs, default=(-1, 0, "", ""))
        if excess >= 0:
            lines.append(
                f"WARNING: classes differ in {name}: that alone tells {a!r} from {b!r} in {(1 + distance) / 2:.0%} of "
                "cases, and networks learn it; save all files in one way"
            )
    return lines


def _distance(a: list, b: list) -> tuple[float, float]:
    """How far the distance of two samples exceeds what counts, and the distance; numbers are ordered, words are not."""
    of_a, of_b = Counter(a), Counter(b)
    gaps = np.array([of_a[value] / len(a) - of_b[value] / len(b) for value in sorted(of_a | of_b)])
    distance = float(np.abs(gaps).sum() / 2 if isinstance(a[0], str) else np.abs(gaps.cumsum()).max())
    return distance - max(_LEAST_DISTANCE, _CHANCE * (1 / len(a) + 1 / len(b)) ** 0.5), distance


def _summary(values: list) -> str:
    if values and isinstance(values[0], str):
        return abbreviate([f"{word} ({count})" for word, count in Counter(values).most_common()], limit=3)
    return " / ".join(f"{value:.3g}" for value in np.quantile(values, [0.05, 0.5, 0.95])) if values else "-"

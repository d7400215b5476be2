"""What a reader must know before believing the figures, in plain words."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cellflux_bridge.metrics.values import Value
from cellflux_bridge.trajectory import MANIFEST, count_incomplete

# Under this many images the bias of a Frechet distance in 2,048 features is what its authors warn of.
ENOUGH_FOR_FRECHET = 2048
NEAREST_TARGET = "nearest real target"
# The quantity's beginning -> what its value, and its interval, need.
_NEEDS = {
    "kid_floor": "4 groups",
    "frechet_floor": "2 images in either half, of different groups",
    "precision_floor": "4 real patches of different groups in either half",
    "recall_floor": "4 real patches of different groups in either half",
    "density_floor": "6 real patches of different groups in either half",
    "coverage_floor": "6 real patches of different groups in either half",
    "kid": "2 groups on either side, and 4 for an interval",
    "frechet": "2 images on either side",
    "precision": "4 real patches of different groups",
    "recall": "4 frames and 4 real patches of different groups",
    "density": "6 real patches of different groups",
    "coverage": "6 real patches of different groups",
    "ms_ssim": "frames of 11 px",
}


def incomplete(folders: Sequence[Path]) -> Iterator[str]:
    """A warning about each trajectory folder whose manifest lacks rows."""
    for folder in folders:
        if num := count_incomplete(folder):
            yield (
                f"{num} sequences of {folder} lack rows in {MANIFEST} and were left out; `cellflux-bridge translate` "
                "makes those of a stopped run."
            )


def repeated(num: int) -> Iterator[str]:
    """A warning about real test patches that are training patches, too."""
    if num:
        yield (
            f"{num} real test patches repeat a training patch and were left out where frames are searched for copies; "
            "the other figures hold them. Near copies among real patches speak of a split that does not keep them "
            "together: group them in the data."
        )


def cautions(values: Sequence[Value]) -> Iterator[str]:
    """Warnings about figures: too few images, and none at all."""
    frechet = [value for value in values if value.quantity.startswith("frechet_")]
    counts = [min(value.n, value.n if value.n_real is None else value.n_real) for value in frechet]
    if counts and min(counts) < ENOUGH_FOR_FRECHET:
        yield (
            f"Frechet distances rest on as few as {min(counts)} images: under {ENOUGH_FOR_FRECHET:,} their bias rules. "
            "Read KID first, and compare only values of the same n."
        )
    for value in values:
        if value.quantity == "near_copy_share" and value.level is None and value.trajectory:
            by_chance = 1 / (value.n_real + 1)
            if value.value > 2 * by_chance:
                yield (
                    f"{value.value:.1%} of the frames of {value.method} lie nearer to a training patch than any "
                    f"held-out real patch does, about {by_chance:.1%} would by chance: look at the near copies."
                )
    yield from _stain(values)
    undefined: dict[tuple[str, str], list[Value]] = {}
    for value in values:
        if np.isnan(value.value) and value.quantity.startswith(tuple(_NEEDS)) and not value.quantity.endswith("spread"):
            undefined.setdefault((value.quantity, value.method), []).append(value)
    for (quantity, method), found in undefined.items():
        need = next(need for start, need in _NEEDS.items() if quantity.startswith(start))  # floors stand first
        levels = ", ".join(f"{value.level:g}" for value in found if value.level is not None)
        against = "" if found[0].n_real is None else f" against {min(value.n_real for value in found)}"
        yield (
            f"{quantity} of {method}{f' at level {levels}' if levels else ''} is undefined: {found[0].n} images"
            f"{against}; it needs {need}."
        )


def _stain(values: Sequence[Value]) -> Iterator[str]:
    """A warning about each network that sees little more at level 1 than a change of stain."""
    ends = [value for value in values if value.quantity == "stain_share" and value.level == 1]
    for extractor in dict.fromkeys(value.extractor for value in ends):
        found = [value for value in ends if value.extractor == extractor]
        high = [value for value in found if value.trajectory and value.value > 0.5]
        if high:
            shares = ", ".join(f"{value.value:.0%} in {value.method}" for value in high)
            real = [
                f" ({value.value:.0%} to the nearest real target)" for value in found if value.method == NEAREST_TARGET
            ]
            yield (
                f"A mere stain transfer explains most of the change that {extractor} sees: "
                f"{shares}{''.join(real)}; ask judges of structure."
            )

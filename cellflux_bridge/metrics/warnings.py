"""Sentences that warn of figures that mislead."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cellflux_bridge.metrics.values import Value
from cellflux_bridge.trajectory import MANIFEST, count_incomplete

# The authors of the Frechet distance warn of its bias with fewer images than this (in 2,048 features).
ENOUGH_FOR_FRECHET = 2048
NEAREST_TARGET = "nearest real target"
# How a quantity begins -> how many images its value, and its interval, need.
_NEEDS = {
    "kid_floor": "4 groups",
    "frechet_floor": "2 images in either half, of different groups",
    **dict.fromkeys(("precision_floor", "recall_floor"), "4 real patches of different groups in either half"),
    **dict.fromkeys(("density_floor", "coverage_floor"), "6 real patches of different groups in either half"),
    "kid": "2 groups on either side, and 4 for an interval",
    "frechet": "2 images on either side",
    "precision": "4 real patches of different groups",
    "recall": "4 frames and 4 real patches of different groups",
    **dict.fromkeys(("density", "coverage"), "6 real patches of different groups"),
    "ms_ssim": "frames of 11 px",
}


def data_warnings(folders: Sequence[Path], num_repeated: int) -> Iterator[str]:
    """About trajectory folders whose manifest lacks rows, and real test patches that are training patches, too."""
    for folder in folders:
        if num := count_incomplete(folder):
            left_out = f"{num} sequences of {folder} lack rows in {MANIFEST} and were left out"
            yield f"{left_out}; `cellflux-bridge translate` makes those of a stopped run."
    if num_repeated:
        yield (
            f"{num_repeated} real test patches repeat a training patch. The search for copies leaves them out; "
            "the other figures include them. Group near copies in the data, so that a split keeps them together."
        )


def figure_warnings(values: Sequence[Value]) -> Iterator[str]:
    """About figures of too few images, near copies, mere changes of stain, and undefined figures."""
    counts = [min(v.n, v.n if v.n_real is None else v.n_real) for v in values if v.quantity.startswith("frechet_")]
    if counts and min(counts) < ENOUGH_FOR_FRECHET:
        yield (
            f"Frechet distances rest on as few as {min(counts)} images: under {ENOUGH_FOR_FRECHET:,} their bias is "
            "large. Read KID first, and compare only values of the same n."
        )
    for value in (v for v in values if v.quantity == "near_copy_share" and v.level is None and v.trajectory):
        by_chance = 1 / (value.n_real + 1)
        if value.value > 2 * by_chance:
            yield (
                f"{value.value:.1%} of the frames of {value.method} lie nearer to a training patch than any "
                f"held-out real patch does, about {by_chance:.1%} would by chance: look at the near copies."
            )
    ends = [value for value in values if value.quantity == "stain_share" and value.level == 1]
    for extractor in dict.fromkeys(value.extractor for value in ends):
        shares = {
            v.method: (f"{v.value:.0%}", v.trajectory and v.value > 0.5) for v in ends if v.extractor == extractor
        }
        if high := [f"{share} in {method}" for method, (share, is_high) in shares.items() if is_high]:
            real = f" ({shares[NEAREST_TARGET][0]} to the nearest real target)" if NEAREST_TARGET in shares else ""
            yield (
                f"A mere stain transfer explains most of the change that {extractor} sees: {', '.join(high)}{real}; "
                "use judges of structure, too."
            )
    undefined: dict[tuple[str, str], list[Value]] = defaultdict(list)
    for value in values:
        if np.isnan(value.value) and value.quantity.startswith(tuple(_NEEDS)) and not value.quantity.endswith("spread"):
            undefined[value.quantity, value.method].append(value)
    for (quantity, method), found in undefined.items():
        need = next(need for start, need in _NEEDS.items() if quantity.startswith(start))  # floors stand first
        levels = ", ".join(f"{value.level:g}" for value in found if value.level is not None)
        against = "" if found[0].n_real is None else f" against {min(value.n_real for value in found)}"
        yield (
            f"{quantity} of {method}{f' at level {levels}' if levels else ''} is undefined: {found[0].n} images"
            f"{against}; it needs {need}."
        )

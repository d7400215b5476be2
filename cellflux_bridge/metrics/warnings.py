"""Sentences that warn of figures that mislead."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cellflux_bridge import checkpoint
from cellflux_bridge.config import load_config
from cellflux_bridge.metrics import nuclei
from cellflux_bridge.metrics.damage import blind_for
from cellflux_bridge.metrics.values import Value
from cellflux_bridge.metrics.words import words
from cellflux_bridge.trajectory import MANIFEST, count_incomplete

# The authors of the Frechet distance warn of its bias with fewer images than this (in 2,048 features).
ENOUGH_FOR_FRECHET = 2048
NEAREST_TARGET = "nearest real target"
# How sentences begin that say what is lacking, not what is wrong.
UNKNOWN = "Not known:"
# A judge that recognises fewer real patches of a class is no judge of made ones.
_GOOD_JUDGE = 0.8
# Above: images that are told from real ones too easily; one step that does what several should.
_TOLD, _UNEVEN = 0.9, 2.0
# How a quantity begins -> how many images its value, and its interval, need.
_NEEDS = {
    "kid_floor": "4 groups",
    "frechet_floor": "2 images in each half, of different groups",
    **dict.fromkeys(("precision_floor", "recall_floor"), "4 real patches of different groups in each half"),
    **dict.fromkeys(("density_floor", "coverage_floor"), "6 real patches of different groups in each half"),
    "kid": "2 groups on each side, and 4 for an interval",
    "frechet": "2 images on each side",
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
            yield f"{left_out}. If the translation was stopped, `cellflux-bridge translate` completes it."
    if num_repeated:
        yield (
            f"{num_repeated} real test patches repeat a training patch. The search for copies leaves them out, but "
            "the other figures include them. Give such patches one group, so that they stay in one split."
        )


def learned_by(folders: Sequence[Path], features: str) -> Iterator[str]:
    """Warn of trajectories whose flow learned by the network in whose features they are measured."""
    for folder in folders if features == nuclei.NAME else ():
        if (file := folder / checkpoint.CONFIG).exists() and load_config(file).perceptual.share:
            yield (
                f"{folder}: its flow learned by the nuclei network, too (perceptual.share), so distances in its "
                "features come out smaller than in those of another network. Read the figures of pixels beside them."
            )


def figure_warnings(values: Sequence[Value]) -> Iterator[str]:
    """About poor judges, near copies, mere changes of stain, few images, and undefined figures: the gravest first."""
    of_real = {(v.extractor, v.method): v.value for v in values if v.quantity == "flip_rate" and v.level is None}
    for judge in dict.fromkeys(v.extractor for v in values if (v.extractor, "real target") in of_real):
        target, source = of_real[judge, "real target"], 1 - of_real[judge, "real source"]
        if min(source, target) < _GOOD_JUDGE:
            yield (
                f"{judge} recognises {source:.0%} of the real source patches and {target:.0%} of the real target "
                f"patches (accuracy {(source + target) / 2:.2f}; 0.50 is chance). Its opinion of made patches is worth "
                "no more. Train this judge for longer or on more patches, then evaluate again."
            )
    yield from _unlike_real(values)
    for value in (v for v in values if v.quantity == "near_copy_share" and v.level is None and v.trajectory):
        by_chance = 1 / (value.n_real + 1)
        if value.value > 2 * by_chance:
            yield (
                f"{value.value:.1%} of the frames of {value.method} lie nearer to a training patch than any held-out "
                f"real patch does. By chance it would be about {by_chance:.1%}. Look at the near-copies."
            )
    ends = [value for value in values if value.quantity == "stain_share" and value.level == 1]
    for extractor in dict.fromkeys(value.extractor for value in ends):
        shares = {
            v.method: (f"{v.value:.0%}", v.trajectory and v.value > 0.5) for v in ends if v.extractor == extractor
        }
        if high := [f"{share} in {method}" for method, (share, is_high) in shares.items() if is_high]:
            real = f" ({shares[NEAREST_TARGET][0]} for the nearest real target)" if NEAREST_TARGET in shares else ""
            yield (
                f"A mere stain transfer explains most of the change that {extractor} sees: {', '.join(high)}{real}. "
                "Use judges of structure, too."
            )
    counts = [min(v.n, v.n if v.n_real is None else v.n_real) for v in values if v.quantity.startswith("frechet_")]
    if counts and min(counts) < ENOUGH_FOR_FRECHET:
        yield (
            f"Fréchet distances rest on as few as {min(counts)} images. Below {ENOUGH_FOR_FRECHET:,} images they come "
            "out much too large. Read KID first, and compare only values of the same n."
        )
    undefined: dict[tuple, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for value in values:
        if np.isnan(value.value) and value.quantity.startswith(tuple(_NEEDS)) and not value.quantity.endswith("spread"):
            start = next(start for start in _NEEDS if value.quantity.startswith(start))  # floors stand first
            of = undefined[_NEEDS[start], value.n, value.n_real][f"{_in_words(value.quantity)} ({value.method})"]
            of += [] if value.level is None else [f"{value.level:g}"]
    for (need, n, n_real), found in undefined.items():
        whats = ", ".join(f"{what} at level {' and '.join(at)}" if at else what for what, at in found.items())
        against = "" if n_real is None else f" against {n_real}"
        yield f"{UNKNOWN} {whats}. This rests on {n} images{against}; it needs {need}."


def _unlike_real(values: Sequence[Value]) -> Iterator[str]:
    """About methods whose images are told from real ones or whose steps are uneven, and networks that see no damage."""
    of_methods = [v for v in values if v.trajectory]
    for value in of_methods:
        if value.quantity == "two_sample_grey_target" and value.value > _TOLD:
            yield (
                f"Level 1 of {value.method} can be told from real target patches by simple statistics of its detail "
                f"(AUC {value.value:.2f}; 0.50: it cannot). Whatever networks say of it: look at the pictures, and "
                "train for longer."
            )
    blind = blind_for(values)
    for value in of_methods:
        if value.quantity == "step_unevenness" and value.value > _UNEVEN and value.extractor not in blind:
            where = f"features of {value.extractor}" if value.extractor else "pixels"
            yield (
                f"The steps of {value.method} are uneven: the largest changes {value.value:.1f} times as much as the "
                f"mean one ({where}). Set translate.spacing=adaptive, or another translate.calibrate."
            )
    for network, names in blind.items():
        yield (
            f"{network} is blind for {' and for '.join(names)}: it cannot tell real patches that are damaged so from "
            "undamaged ones. Do not believe its distances; train it for longer, or name another with --features."
        )


def _in_words(quantity: str) -> str:
    kind = quantity.removesuffix("_floor")
    label = {"kid": "KID", "frechet": "Fréchet distance"}.get(kind, words(kind).label.removesuffix(", worst"))
    return f"floor of {label}" if kind != quantity else label

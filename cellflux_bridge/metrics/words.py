"""All quantities that `metrics.evaluate` computes: what each is called, what it means, and what a table shows of it.

A quantity has a value a level, a value of the whole sequences, or both. A value that does not exist is NaN: a ratio to
a distance that is not above 0, an interval of a Frechet distance. *_own compares the frames of a level to real patches
of the level's score, or else of the nearer class; *_target compares frames of level 1 to real target patches; *_pooled
compares to both classes (Frechet distance and figures of neighbourhoods: all frames after the sources as one set).

Real patches have floors: kid_floor, frechet_floor, precision_floor, recall_floor, density_floor and coverage_floor are
means over random halves by group, `n` against `n_real` patches (`low` and `high`: their 95 % range), *_floor_spread the
standard deviations: of both classes ("real pooled"), of target patches ("real target"), and, a level, of the patches
that *_own compares to ("real own"). A Frechet distance is larger with half as many patches, so its floor is too high.
Real patches also have probability, flip_rate, severity_error, and the figures of `metrics.structure`.
"""

import math
from typing import NamedTuple


class Words(NamedTuple):
    """`where` says what the report shows: level 1 ("end"), the "whole" sequence, the "largest" or "smallest" level;
    `table` what the Markdown table shows, where that differs: also "mean" over levels, "inner" (largest below 1)."""

    section: str
    label: str
    reading: str
    where: str = "end"
    table: tuple[str, ...] = ()


# Sections, and in each: quantity | where, or where/table | label | reading
_TEXT = """
real: Can they be told from real patches?
two_sample_grey_target | end | told from real by grey bands (AUC) | two-sample test; 0.5: cannot be told; 1: always
two_sample_colour_target | end | told from real by colour bands (AUC) | the same, of red, green - mean, blue - mean
two_sample_network_target | end | told from real by a small network (AUC) | the same, by a network trained on pixels
two_sample_features_target | end | told from real by features (AUC) | the same, of what the extractor sees
two_sample_grey_own | largest/mean | told from real of the same level by grey bands, worst | AUC; 0.5: cannot be told
two_sample_colour_own | largest/mean | told from real of the same level by colour bands, worst | AUC
swd_full_target | end | SWD to real target, full size | sliced Wasserstein distance of the finest detail; see the floor
swd_half_target | end | SWD to real target, half size | the same, of detail twice as large
swd_quarter_target | end | SWD to real target, quarter size | the same, of detail four times as large
swd_eighth_target | end | SWD to real target, 1/8 size | the same, of detail eight times as large
swd_sixteenth_target | end | SWD to real target, 1/16 size | the same, of what is left
spectrum_error_target | end | error of the spectrum | mean over frequencies of the difference of log10 power to real

arrival: Does it arrive?
flip_rate | end | called the target class (flip rate) | share of images; compare with real target patches
probability | end | mean p(target) | p: probability of the target class; the aim is what real target patches get

levels: Do the levels mean what they say?
calibration_mean | whole | error of the mean p | mean over levels of |mean p - level|; 0 is exact
calibration_image | whole | error of each image's p | mean over images and levels of |p - level|; 0 is exact
monotone_share | whole | p never falls | share of sequences in which p never falls by over 0.02 from frame to frame
rank_correlation | whole | rank correlation of p with the level | Spearman, mean over sequences; 1 is best
severity_error | whole | severity error | mean |estimated severity - level|; real patches: the estimator's own error

likeness: Do the images look like real ones?
kid_target | end | KID to real target | unbiased distance; 0: equal; floor: between halves of real patches
kid_own | largest/mean | KID to real of the same level, worst | distance at the worst level
kid_pooled | largest | KID to all real, worst | to both classes together
kid_pooled_over_floor | whole/inner whole | KID to all real, minus the floor, worst | 0: as near as real patches
frechet_target | end | Fréchet distance to real target | too large where n is small: read KID first
frechet_own | largest/mean | Fréchet distance to real of the same level, worst | too large where n is small
frechet_pooled | whole | Fréchet distance of all frames to all real | too large where n is small
precision_target | end | precision at real target | share of frames that lie among real target patches
recall_target | end | recall of real target | share of real target patches that lie among frames
density_target | end | density at real target | like precision, but steadier; may exceed 1
coverage_target | end | coverage of real target | share of real target patches that have a frame near them
precision_own | smallest/mean | precision, same level, worst | share of frames that lie among the level's real patches
recall_own | smallest/mean | recall, same level, worst | share of the level's real patches that lie among frames
density_own | smallest/mean | density, same level, worst | like precision, but steadier; may exceed 1
coverage_own | smallest/mean | coverage, same level, worst | share of the level's real patches that have a frame near
precision_pooled | whole | precision of all frames, all real | both classes together
recall_pooled | whole | recall of all frames, all real | both classes together
density_pooled | whole | density of all frames, all real | both classes together
coverage_pooled | whole | coverage of all frames, all real | both classes together
guidance_kid_ratio | whole | KID guided / unguided | same level, common sources; mean over levels of the ratio
guidance_kid_ratio_of_means | whole | KID guided / unguided, ratio of means | below 1: guidance helps
guidance_frechet_ratio | whole | Fréchet distance guided / unguided | mean over levels of the ratio
guidance_frechet_ratio_of_means | whole | Fréchet distance guided / unguided, ratio of means | below 1: guidance helps

kept: Is it still the same tissue, and are the steps even?
preservation | end/inner | distance to own source | 0: the same; 1: as far as a random real source patch
path_over_straight | whole | length of the way / straight distance | in features; 1 is a straight way
step_unevenness | whole | largest / mean of the mean steps | in pixels, and in features; 1: even; above 2: a warning
largest_over_mean_step | whole | largest / mean step | in features; 1: even steps; number of levels: one jump
ms_ssim | end | MS-SSIM to own source | of haematoxylin; 1: equal; real: between different source patches
layer_distance | end | layer distance to own source | like LPIPS; 0: equal; real: between different patches
cycle_preservation | whole | there and back: distance to own source | 0: the same; 1: as far as other sources
cycle_ms_ssim | whole | there and back: MS-SSIM | 1: it returns to its source
cycle_layer_distance | whole | there and back: layer distance | 0: it returns to its source

memory: Are images copied from the training set?
nearest_training_ratio | end | distance to training | median, divided by that of held-out real patches of the class
nearest_training_closer | end | nearer to training than held-out | how probable that is; 0.5: nothing is memorised
near_copy_share | whole | near-copies | share of frames nearer than all M held-out patches; by chance 1 / (M + 1)

tissue: Stain and texture
stain_share | end | change explained by stain | share of the squared feature change that a colour transfer explains
haematoxylin_area | end | haematoxylin area | share of pixels; the aim is what real target patches have
contrast | end | contrast | standard deviation of pixels
fine_outlines | end | outlines in fine detail | sparseness of the finest octave; noise 0, outlines more; aim: as real

damage: Does the network see known damage?
damage_response | end | response to damage | KID of damaged real patches, above its floor, in standard deviations of it

cost: What does it cost?
nfe | whole | network forwards | per sequence
gradients | whole | classifier gradients | per sequence
seconds | whole | seconds | per sequence, by the clock, on the method's device
cpu_seconds | whole | CPU seconds | per sequence, on a CPU only

other: Further figures
"""


def _read(text: str) -> tuple[dict[str, str], dict[str, Words]]:
    sections, quantities, section = {}, {}, ""
    for line in filter(None, text.splitlines()):
        quantity, *cells = line.split(" | ", 3)
        if cells:
            (where, _, table), label, reading = cells[0].partition("/"), *cells[1:]
            quantities[quantity] = Words(section, label, reading, where, tuple(table.split()))
        else:
            section, _, sections[section] = line.partition(": ")
    return sections, quantities


SECTIONS, QUANTITIES = _read(_TEXT)
# Sections of what judges say of a class. All other figures by a network are distances in its features.
OPINIONS = ("arrival", "levels")

# Of cellularity.json.
NUCLEI = {
    "area_fraction": "nuclear area (share of the patch)",
    "count": "nuclei (count)",
    "mean_area": "mean nuclear area (px)",
    "mean_area_um2": "mean nuclear area (µm²)",
    "eccentricity": "eccentricity",
    "darkness": "haematoxylin darkness",
    "density_mm2": "nuclei per mm²",
}


def floor_of(quantity: str) -> tuple[str, str] | None:
    """The floor of a quantity: (which real patches, which figure); None where real patches have the quantity itself.

    A floor of "own" patches, those of a level, has that level; other floors have none.
    """
    kind, _, to = quantity.rpartition("_")
    if kind and to in ("target", "pooled", "own"):
        return to, f"{kind}_floor"
    return {"severity_error": ("scored", "severity_error")}.get(quantity)


def words(quantity: str) -> Words:
    """The words of a quantity; one that is not known here is shown under its own name."""
    return QUANTITIES.get(quantity, Words("other", quantity.replace("_", " "), ""))


def number(value: float | None) -> str:
    """Three significant digits, with an exponent below 0.001 only; None and NaN are undefined."""
    if value is None or math.isnan(value):
        return "undefined"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """Both ends, or nothing where there is no interval."""
    return "" if low is None or high is None else f"{number(low)} \N{EN DASH} {number(high)}"

"""What figures are called in a report, and how a reader who did not compute them should read them."""

from typing import NamedTuple


class Words(NamedTuple):
    """`where` says what the main table shows: level 1 ("end"), the "whole" sequence, "largest" or "smallest" level."""

    section: str
    label: str
    reading: str
    where: str = "end"


SECTIONS = {
    "arrival": "Does it arrive?",
    "levels": "Do the levels mean what they say?",
    "likeness": "Do the images look like real ones?",
    "kept": "Is it still the same tissue, and is the way even?",
    "memory": "Are images copied from the training set?",
    "tissue": "What no network was asked",
    "cost": "What does it cost?",
    "other": "Further figures",
}

QUANTITIES = {
    "flip_rate": Words("arrival", "called the target class", "share of images at level 1; real target patches beside"),
    "probability": Words("arrival", "mean p(target)", "at level 1; what real target patches get is the aim"),
    "calibration_mean": Words(
        "levels", "error of the mean p", "mean over levels of |mean p - level|; 0 is exact", "whole"
    ),
    "calibration_image": Words("levels", "error of each image's p", "mean |p - level| of single images", "whole"),
    "monotone_share": Words(
        "levels", "never falls back", "share of sequences whose p never falls by over 0.02", "whole"
    ),
    "rank_correlation": Words("levels", "rank correlation with the level", "Spearman, mean over sequences", "whole"),
    "severity_error": Words(
        "levels", "severity error", "mean |estimated severity - level|; real: its own error", "whole"
    ),
    "kid_target": Words("likeness", "KID to real target", "unbiased; beside the floor between real halves"),
    "kid_own": Words(
        "likeness", "KID to real of the own level, worst", "against real patches of that level", "largest"
    ),
    "kid_pooled": Words("likeness", "KID to real, pooled, worst", "both classes together", "largest"),
    "kid_pooled_over_floor": Words("likeness", "KID pooled, over the floor, worst", "0 is as near as real", "whole"),
    "frechet_target": Words(
        "likeness", "Fréchet distance to real target", "biased upwards for small n: read KID first"
    ),
    "frechet_own": Words("likeness", "Fréchet, own level, worst", "biased upwards for small n", "largest"),
    "precision_target": Words("likeness", "precision at real target", "share of frames among real target patches"),
    "recall_target": Words("likeness", "recall of real target", "share of real target patches among frames"),
    "density_target": Words("likeness", "density at real target", "like precision, steadier; may exceed 1"),
    "coverage_target": Words("likeness", "coverage of real target", "share of real patches with a frame near"),
    "precision_own": Words("likeness", "precision, own level, worst", "", "smallest"),
    "recall_own": Words("likeness", "recall, own level, worst", "", "smallest"),
    "density_own": Words("likeness", "density, own level, worst", "", "smallest"),
    "coverage_own": Words("likeness", "coverage, own level, worst", "", "smallest"),
    "guidance_kid_ratio": Words("likeness", "KID guided / unguided", "mean of the levels' ratios", "whole"),
    "guidance_kid_ratio_of_means": Words(
        "likeness", "KID guided / unguided, of means", "below 1: guidance helps", "whole"
    ),
    "guidance_frechet_ratio": Words("likeness", "Fréchet guided / unguided", "mean of the levels' ratios", "whole"),
    "guidance_frechet_ratio_of_means": Words(
        "likeness", "Fréchet guided / unguided, of means", "below 1: helps", "whole"
    ),
    "preservation": Words("kept", "distance to own source", "relative to a random real source: 0 same, 1 unrelated"),
    "path_over_straight": Words("kept", "way / straight distance", "in features; 1 is a straight way", "whole"),
    "largest_over_mean_step": Words("kept", "largest / mean step", "1 is even, K one single jump", "whole"),
    "ms_ssim": Words("kept", "MS-SSIM to own source", "haematoxylin; real: between different source patches"),
    "layer_distance": Words("kept", "layer distance to own source", "LPIPS-like; real: between different patches"),
    "cycle_preservation": Words("kept", "there and back: distance", "to the own source, over that to others", "whole"),
    "cycle_ms_ssim": Words("kept", "there and back: MS-SSIM", "1 returns to the source", "whole"),
    "cycle_layer_distance": Words("kept", "there and back: layer distance", "0 returns to the source", "whole"),
    "nearest_training_ratio": Words("memory", "distance to training", "median, over that of held-out real patches"),
    "nearest_training_closer": Words("memory", "nearer to training than held-out", "chance; 0.5 is no memory"),
    "near_copy_share": Words("memory", "near-copies", "share of frames nearer than all held-out patches", "whole"),
    "stain_share": Words("tissue", "change explained by stain", "share that a mere stain transfer would make, too"),
    "haematoxylin_area": Words("tissue", "haematoxylin area", "share of pixels; real target patches are the aim"),
    "contrast": Words("tissue", "contrast", "standard deviation of pixels"),
    "fine_detail": Words("tissue", "fine detail", "mean difference of neighbouring pixels, grey levels"),
    "nfe": Words("cost", "network forwards", "a sequence", "whole"),
    "gradients": Words("cost", "classifier gradients", "a sequence", "whole"),
    "seconds": Words("cost", "seconds", "a sequence, by the clock", "whole"),
    "cpu_seconds": Words("cost", "CPU seconds", "a sequence", "whole"),
}

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
    """Which figure of which real patches stands beside a quantity as its floor; None where their own one does.

    That of "own", real patches of a level, has the level; the others have none.
    """
    kind, _, to = quantity.rpartition("_")
    if kind and to in ("target", "pooled", "own"):
        return to, f"{kind}_floor"
    return {"severity_error": ("scored", "severity_error")}.get(quantity)


def words(quantity: str) -> Words:
    """The words of a quantity; one that is not known here is shown under its own name."""
    return QUANTITIES.get(quantity, Words("other", quantity.replace("_", " "), ""))


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where there need be none."""
    if value is None:
        return "undefined"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """Both ends, or nothing where there is no interval."""
    return "" if low is None or high is None else f"{number(low)} \N{EN DASH} {number(high)}"

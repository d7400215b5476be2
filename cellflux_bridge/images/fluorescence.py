"""Nuclei in the nuclear channel of a fluorescence image."""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter


class Nuclei(NamedTuple):
    """What a nuclear channel shows: of the nucleus nearest to the middle, NaN where there is none, and of all."""

    area: float  # px
    intensity: float  # mean grey level less background
    num: float  # of all nuclei


def measure_nuclei(dna: np.ndarray) -> Nuclei:
    """The nuclei of a nuclear channel (H, W) of any number type."""
    nuclei, main = nuclei_of(np.asarray(dna, dtype=np.float64))
    if not main:
        return Nuclei(float("nan"), float("nan"), 0.0)
    nucleus = nuclei == main
    return Nuclei(float(nucleus.sum()), float(dna[nucleus].mean() - np.percentile(dna, 10)), float(nuclei.max()))


def nuclei_of(dna: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels (H, W) of nuclei, and that of the one nearest to the middle; 0 where there is none."""
    from skimage.filters import threshold_otsu
    from skimage.measure import label
    from skimage.morphology import h_maxima
    from skimage.segmentation import watershed

    smooth = gaussian_filter(dna, 0.7)
    nuclear = smooth > threshold_otsu(smooth)
    within = gaussian_filter(distance_transform_edt(nuclear), 0.5)  # its peaks divide nuclei that touch
    nuclei = watershed(-within, label(h_maxima(within, 0.5)), mask=nuclear)
    rows, columns = np.indices(nuclei.shape) - (np.reshape(nuclei.shape, (2, 1, 1)) - 1) / 2
    nearest = np.where(nuclei > 0, np.hypot(rows, columns), np.inf).argmin()
    return nuclei, int(nuclei.flat[nearest])

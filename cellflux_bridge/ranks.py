"""Spearman's rank correlation along sequences."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def rank_correlation(values: np.ndarray, levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """Spearman's correlation (N,) of values (N, K) with the levels (K,), over the levels where a value is finite.

    A sequence whose values never change has no rank of its levels: 0. One with fewer than three values: NaN.
    """
    found = np.full(len(values), np.nan)
    for number, own in enumerate(values):
        finite = np.isfinite(own)
        if finite.sum() >= 3:
            one, other = rankdata(own[finite]), rankdata(np.asarray(levels)[finite])
            found[number] = 0.0 if np.ptp(one) == 0 else np.corrcoef(one, other)[0, 1]
    return found

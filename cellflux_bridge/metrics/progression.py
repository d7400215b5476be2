"""The way of sequences from A to B: pure functions of arrays, with the sequences along the first axis.

`probability` (N, K+1) is what a judge gives the target class, `features` (N, K+1, D) what a network sees, frame 0 the
source itself; `levels` (K,) are s_1..s_K in (0, 1], the soft labels that the frames after the source should have.
"""

import numpy as np


def calibration_of_means(probability: np.ndarray, levels: np.ndarray) -> float:
    """Mean over levels of |mean probability - s_k|: whether a level is right on average."""
    return float(np.abs(probability[:, 1:].mean(0) - levels).mean())


def calibration_of_images(probability: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """For each sequence the mean over levels of |probability - s_k|, (N,): whether each image is right."""
    return np.abs(probability[:, 1:] - levels).mean(1)


def is_monotone(probability: np.ndarray, *, tolerance: float = 0.02) -> np.ndarray:
    """Whether the probability never falls by more than `tolerance` from one frame to the next, (N,) bool."""
    # The slack is for float32, in which 0.5 - 0.48 is more than 0.02.
    return (np.diff(probability.astype(np.float64), axis=1) >= -tolerance - 1e-6).all(1)


def distance_to_source(features: np.ndarray) -> np.ndarray:
    """Euclidean distance of every frame to its own source, (N, K+1)."""
    return np.linalg.norm(features - features[:, :1], axis=2)


def distance_to_others(
    features: np.ndarray, others: np.ndarray, *, groups: np.ndarray, other_groups: np.ndarray
) -> np.ndarray:
    """Mean distance of every frame to the real source patches `others` (M, D) that are not of its own group, (N, K+1).

    This is the expectation of the distance to a random A; NaN for a sequence whose group holds all of them.
    """
    result = np.full(features.shape[:2], np.nan)
    squares = (others**2).sum(1)
    for n, frames in enumerate(features):
        foreign = other_groups != groups[n]
        if foreign.any():
            squared = (frames**2).sum(1)[:, None] + squares[foreign] - 2 * frames @ others[foreign].T
            result[n] = np.sqrt(np.maximum(squared, 0)).mean(1)
    return result


def feature_steps(features: np.ndarray) -> np.ndarray:
    """Euclidean distances of neighbouring frames, (N, K)."""
    return np.linalg.norm(np.diff(features, axis=1), axis=2)


def path_over_straight(features: np.ndarray) -> np.ndarray:
    """Length of the way through the features over the straight distance of its ends, (N,); NaN where it is closed."""
    return _ratio(feature_steps(features).sum(1), np.linalg.norm(features[:, -1] - features[:, 0], axis=1))


def largest_over_mean_step(features: np.ndarray) -> np.ndarray:
    """The largest step between neighbouring frames over the mean one, (N,): 1 is even, K one single jump; NaN where
    nothing moves."""
    steps = feature_steps(features)
    return _ratio(steps.max(1), steps.mean(1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)

"""Soft labels of patches: (N, num_classes) float32 whose rows sum to 1."""

from collections.abc import Sequence

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.data.patches import Patches


def from_scores(scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Scores (N,) in [0, 1] laid over the classes in their order; NaN stays NaN.

    Two classes: score c is (1 - c, c). More: 0 is the first class, 1 the last, and a score between two neighbouring
    classes is a mixture of these two, linear in the score.
    """
    position = np.asarray(scores, np.float64)[:, None] * (num_classes - 1)
    return np.maximum(0, 1 - np.abs(position - np.arange(num_classes))).astype(np.float32)


def soft_labels(patches: Patches, kind: str, *, needed: Sequence[int], key: str) -> np.ndarray:
    """The soft label of every patch by its "class" or by its "score"; rows without a score are NaN.

    Raises UserError that names the patches among the numbers `needed` whose score is missing or outside [0, 1]; `key`
    is the setting that asked for scores.
    """
    num_classes = len(patches.classes)
    if kind == "class":
        return np.eye(num_classes, dtype=np.float32)[patches.labels]
    scores = patches.scores[needed]
    for wrong, what in ((np.isnan(scores), "no score"), ((scores < 0) | (scores > 1), "a score outside [0, 1]")):
        if wrong.any():
            names = [patches.ids[i] for i in np.asarray(needed)[wrong]]
            raise UserError(
                f"{key}=score: {len(names)} patches have {what}: {abbreviate(names)}; give every patch a score from 0 "
                f"({patches.classes[0]}) to 1 ({patches.classes[-1]}) in the manifest, or set {key}=class"
            )
    return from_scores(patches.scores, num_classes)

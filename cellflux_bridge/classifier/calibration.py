"""Calibration of classifiers: temperature scaling, and measures of it.

Targets are soft labels (N, num_classes), one-hot where the truth is a class; weights (N,) say how much each row counts.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

_LOG_TEMPERATURES = (-3.0, 3.0)
_BINS = 15


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) of mean 1 that give every present class the same sum, as in training batches."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[inverse])


def negative_log_likelihood(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, temperature: float = 1.0
) -> float:
    """Mean cross-entropy, in nats, of softmax(logits / temperature) against the targets."""
    per_row = -(targets * log_softmax(logits.astype(np.float64) / temperature, axis=1)).sum(1)
    return float(np.average(per_row, weights=weights))


def fit_temperature(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, prior: float = 1.0) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, section 4.2), in [0.05, 20].

    Logits without a single error would lead to temperature 0, that is, to certainty about every future image. So each
    class gets `prior` extra patches of every class, as in Platt (1999, section 2.2): with n patches a class, the
    probability ends at (n + 1) / (n + num_classes).
    """
    num_classes = targets.shape[1]
    of_a_class = len(targets) / num_classes
    smooth = (of_a_class * targets + prior) / (of_a_class + prior * num_classes)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, smooth, weights, temperature=np.exp(log_temperature))

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-6}).x))


def expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error of the most probable class, over 15 bins of equal width (Guo et al. 2017, eq. 3).

    In each bin the mean confidence is compared with the mean share of the predicted class in the targets (with the
    accuracy, where targets are classes); the distances are averaged over rows.
    """
    predicted = probabilities.argmax(1)
    rows = np.arange(len(predicted))
    excess = weights * (probabilities[rows, predicted] - targets[rows, predicted])
    bins = np.minimum((probabilities[rows, predicted] * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, excess, minlength=_BINS)).sum() / weights.sum())


def area_under_curve(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: of two classes, or the mean over one class against the rest; NaN for one class."""
    present = [c for c in range(probabilities.shape[1]) if 0 < (labels == c).sum() < len(labels)]
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in present]
    return float(np.mean(areas)) if areas else float("nan")


def figures(logits: np.ndarray, labels: np.ndarray, targets: np.ndarray, *, temperature: float) -> dict[str, float]:
    """How a classifier does on N images: logits (N, num_classes), labels (N,), soft labels `targets`.

    Calibration errors ("ece") are against the soft labels, before and after temperature scaling, with every class
    weighted alike, as the classifier was trained.
    """
    predicted, weights = logits.argmax(1), balanced_weights(labels)
    calibrated = softmax(logits / temperature, axis=1)
    return {
        "n": len(labels),
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "auc": area_under_curve(calibrated, labels),
        "temperature": temperature,
        "ece_uncalibrated": expected_calibration_error(softmax(logits, axis=1), targets, weights),
        "ece": expected_calibration_error(calibrated, targets, weights),
    }

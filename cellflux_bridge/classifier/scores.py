"""Scores of a trained classifier on held-out patches, beside those of colour alone."""

import numpy as np
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellflux_bridge.classifier.calibration import area_under_curve, expected_calibration_error, figures
from cellflux_bridge.classifier.inference import patch_logits, state_logits
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.classifier.states import States
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.soft_labels import soft_labels

# Colour statistics of a class need no more patches than this, however many there are.
MOST_FOR_STATISTICS = 2000
_CHUNK = 256
_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def image_scores(
    model: PatchClassifier, patches: Patches, *, device: torch.device, labels: str = "class"
) -> dict[str, float]:
    """Figures of the test split, beside a logistic regression on colour means and spreads alone (fitted on at most
    `MOST_FOR_STATISTICS` training patches, every class weighted alike, as in the classifier's own batches).

    See `calibration.figures`; with `labels` "score" targets are the soft labels, and `score_mae` is the mean distance
    of the expected score from the true one.
    """
    test, temperature = patches.indices("test"), model.temperature.item()
    truth, by_colour = patches.labels[test], colour_probabilities(patches, test)
    logits = patch_logits(model, patches, test, device=device)
    targets = soft_labels(patches, labels, needed=test, key="classifier.labels")[test]
    found = {
        **figures(logits, truth, targets, temperature=temperature),
        "colour_only_balanced_accuracy": balanced_accuracy_score(truth, by_colour.argmax(1)),
        "colour_only_auc": area_under_curve(by_colour, truth),
    }
    if labels == "score":
        expected = softmax(logits / temperature, axis=1) @ np.linspace(0, 1, len(patches.classes))
        found["score_mae"] = float(np.abs(expected - patches.scores[test]).mean())
    return {f"test/{name}": value for name, value in found.items()}


def state_scores(
    model: PatchClassifier, config: Config, patches: Patches, *, device: torch.device, levels: np.ndarray | None = None
) -> dict[str, float]:
    """Figures of a classifier of states on pairs of the test split: the accuracy at a few times, and calibration errors
    over all of them. `levels` are those of `States`; where a test patch lacks its level, no pairs can be drawn and the
    only figure is "test/n" = 0."""
    test = patches.indices("test")
    if levels is not None and np.isnan(levels[test]).any():
        return {"test/n": 0}
    labels = soft_labels(patches, config.classifier.labels, needed=test, key="classifier.labels")
    train = config.classifier.train
    states = States(config, patches, labels, split="test", levels=levels)
    numbers = range(-(-train.validate_pairs // train.batch_size))
    scores, found = {"test/n": len(test)}, []
    for time in _TIMES:
        batches = (states.batch(number, time=time) for number in numbers)
        found.append(state_logits(model, batches, device=device))
        logits, targets, _ = found[-1]
        scores[f"test/accuracy_at_t{time}"] = float((logits.argmax(1) == targets.argmax(1)).mean())
    logits, targets, bins = map(np.concatenate, zip(*found, strict=True))
    scaled = logits / model.temperature.cpu().numpy()[bins, None]
    for name, values in {"ece_uncalibrated": logits, "ece": scaled}.items():
        error = expected_calibration_error(softmax(values, axis=1), targets, np.ones(len(targets)))
        scores[f"test/{name}"] = error
    return scores


def colour_probabilities(patches: Patches, indices: np.ndarray) -> np.ndarray:
    train = patches.sample("train", num=MOST_FOR_STATISTICS, seed=0)

    def statistics(chosen: np.ndarray) -> np.ndarray:
        parts = np.split(chosen, range(_CHUNK, len(chosen), _CHUNK))
        return np.concatenate([colour_statistics(patches.centre(part)) for part in parts])

    colour = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    colour.fit(statistics(train), patches.labels[train])
    probabilities = np.zeros((len(indices), len(patches.classes)))
    probabilities[:, colour.classes_] = colour.predict_proba(statistics(indices))
    return probabilities


def colour_statistics(batch: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation of each channel, (N, 6), of uint8 patches (N, 3, H, W)."""
    flat = batch.float().flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], dim=1).numpy()

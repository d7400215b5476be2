"""Classification of patches as a training task."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from cellflux_bridge import images
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.config import ClassifierConfig, Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.errors import UserError
from cellflux_bridge.randomness import torch_generator
from cellflux_bridge.training import checkpoint

# Colour statistics of a class need no more patches than this, however many there are.
MOST_FOR_STATISTICS = 2000


class LabelledBatch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def build_classifier(config: Config) -> PatchClassifier:
    """The (untrained) classifier of a resolved configuration."""
    c = config.classifier
    return PatchClassifier(
        len(config.data.classes),
        backbone=c.backbone,
        pretrained=c.pretrained,
        view=c.view,
        jitter=c.jitter,
        blur=c.blur,
    )


class ClassifierTask:
    """Cross-entropy on class-balanced batches of random crops."""

    def __init__(self, config: Config, patches: Patches):
        self._patches, self._seed = patches, config.seed
        self._config: ClassifierConfig = config.classifier
        self._flips = config.data.flips
        self.preprocessing = patches.preprocessing
        self.model = build_classifier(config)
        _require_fit(self.model, config)
        self._train = [patches.indices("train", label) for label in patches.classes]
        self._val = patches.indices("val")
        for label, indices in zip(patches.classes, self._train, strict=True):
            if len(indices) == 0:
                raise UserError(f"class {label!r} has no patch in the train split; see `cellflux-bridge data check`")
        for split in ("val", "test"):
            if len(patches.indices(split)) == 0:
                raise UserError(f"the {split} split is empty; raise data.split.{split} or name splits in the data")

    def batch(self, index: int, *, rank: int) -> LabelledBatch:
        generator = torch_generator(self._seed, "classifier", self._config.view, index, rank)
        y = torch.randint(len(self._train), (self._config.train.batch_size,), generator=generator)
        draws = torch.rand(len(y), generator=generator)
        chosen = [self._train[c][int(u * len(self._train[c]))] for c, u in zip(y.tolist(), draws.tolist(), strict=True)]
        return LabelledBatch(images.encode(self._patches.random(chosen, flips=self._flips, generator=generator)), y)

    def loss(self, model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
        return F.cross_entropy(model(batch.x), batch.y, label_smoothing=0.05)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        predicted = _predict_patches(model, self._patches, self._val, device=device).argmax(1)
        return {"val/accuracy": accuracy_score(self._patches.labels[self._val], predicted)}

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None


def _require_fit(model: PatchClassifier, config: Config) -> None:
    size = config.data.image_size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"classifier.backbone={config.classifier.backbone}: cannot see patches of data.image_size={size} px "
            f"({error}); choose another timm model, such as a ResNet, or 'small'"
        ) from error
    finally:
        model.train()


def load(folder: Path, device: torch.device) -> PatchClassifier:
    """The classifier of a checkpoint folder, in evaluation mode."""
    config = checkpoint.read_config(folder)
    untrained = config.classifier.model_copy(update={"pretrained": False})  # its own weights follow
    model = build_classifier(config.model_copy(update={"classifier": untrained}))
    checkpoint.load_weights(folder, model)
    return model.to(device).eval()


@torch.no_grad()
def predict(model: nn.Module, batch: torch.Tensor, *, device: torch.device, chunk: int = 256) -> np.ndarray:
    """Class probabilities (N, num_classes) of uint8 patches (N, 3, H, W)."""
    model.eval()
    logits = [model(images.encode(part).to(device)).float().cpu() for part in batch.split(chunk)]
    return torch.cat(logits).softmax(1).numpy()


def _chunks(indices: np.ndarray, chunk: int = 256) -> list[np.ndarray]:
    return [indices[start : start + chunk] for start in range(0, len(indices), chunk)]


def _predict_patches(model: nn.Module, patches: Patches, indices: np.ndarray, *, device: torch.device) -> np.ndarray:
    """`predict` of the middle patches of a data set, never more than a chunk of them in memory."""
    return np.concatenate([predict(model, patches.centre(part), device=device) for part in _chunks(indices)])


def test_scores(model: nn.Module, patches: Patches, *, device: torch.device) -> dict[str, float]:
    """Accuracy on the test split, beside a logistic regression on colour means and spreads alone (fitted on at most
    `MOST_FOR_STATISTICS` training patches)."""
    test = patches.indices("test")
    train = patches.sample("train", num=MOST_FOR_STATISTICS, seed=0)
    labels = patches.labels[test]
    predicted = _predict_patches(model, patches, test, device=device).argmax(1)

    def statistics(indices: np.ndarray) -> np.ndarray:
        return np.concatenate([colour_statistics(patches.centre(part)) for part in _chunks(indices)])

    colour = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    colour.fit(statistics(train), patches.labels[train])
    by_colour = colour.predict(statistics(test))
    return {
        "test/n": len(test),
        "test/accuracy": accuracy_score(labels, predicted),
        "test/balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "test/colour_only_balanced_accuracy": balanced_accuracy_score(labels, by_colour),
    }


def colour_statistics(batch: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation of each channel, (N, 6), of uint8 patches (N, 3, H, W)."""
    flat = batch.float().flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], dim=1).numpy()

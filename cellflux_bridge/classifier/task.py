"""Classification of patches, or of a flow's states, as a training task."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import derive_seed, numpy_generator, torch_generator
from cellflux_bridge.classifier.calibration import balanced_weights, fit_temperature
from cellflux_bridge.classifier.inference import build_classifier, patch_logits, state_logits
from cellflux_bridge.classifier.model import TIME_BINS, PatchClassifier
from cellflux_bridge.classifier.states import LabelledBatch, States
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.config import Config
from cellflux_bridge.data.balanced import BalancedPatches
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.soft_labels import soft_labels

_CHUNK = 256
# So many validation patches give a temperature to within some 3 % (standard error); no more are used.
_ENOUGH_TO_VALIDATE = 4096


class ClassifierTask:
    """Cross-entropy on class-balanced batches of random crops, or on the states that the flow's sampler visits.

    Judges and guides draw their initial weights and batches from different random streams, so that they are
    independent. In cross-fitting `train` are the numbers of the training patches and `stream` names the fold. `levels`
    are the flow's own, where states are seen and its condition is a level. Labels are classes or, with
    classifier.labels=score, soft. Images may be mixed (mixup, Zhang et al. 2018): a classifier trained on two classes
    is steep between them; mixup makes it nearly linear there, as a guide of intermediate levels should be
    (Thulasidasan et al. 2019 find it better calibrated).

    Raises UserError for a class without training patches, an empty split, a missing score and an unfit backbone.
    """

    def __init__(
        self,
        config: Config,
        patches: Patches,
        *,
        train: np.ndarray | None = None,
        stream: str = "",
        levels: np.ndarray | None = None,
    ):
        self._patches, self._seed, self.preprocessing = patches, config.seed, patches.preprocessing
        self._config = c = config.classifier
        self._stream = ("classifier", c.role, c.sees, c.view, stream, *([c.seed] if c.seed else []))
        held_out = ("val", "test") if train is None else ("val",)
        for split in held_out:
            if len(patches.indices(split)) == 0:
                raise UserError(f"the {split} split is empty; raise data.split.{split} or name splits in the data")
        train = patches.indices("train") if train is None else train
        needed = np.concatenate([train, *map(patches.indices, held_out)])
        self._labels = soft_labels(patches, c.labels, needed=needed, key="classifier.labels")
        self._val = _validation_patches(patches, most=max(c.train.validate_pairs, _ENOUGH_TO_VALIDATE), seed=self._seed)
        self._train = BalancedPatches(patches, train, data=config.data)
        # Hard labels are smoothed, because certainty has no gradient; the temperature removes the bias.
        self._smoothing = 0.05 if c.labels == "class" and c.sees == "image" else 0.0
        self._states: dict[str, States] = {}
        for split in ("train", "val") if c.sees == "state" else ():
            self._states[split] = States(config, patches, self._labels, split=split, levels=levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._seed, *self._stream, "weights"))
            self.model = build_classifier(config)
        _require_fit(self.model, config)

    def batch(self, index: int, *, rank: int) -> LabelledBatch:
        if self._states:
            return self._states["train"].batch(index, rank=rank)
        generator = torch_generator(self._seed, *self._stream, index, rank)
        jitter = torch_generator(self._seed, *self._stream, "stain", index, rank)
        x, _, chosen = self._train.draw(self._config.train.batch_size, generator=generator, jitter=jitter)
        y = torch.from_numpy(self._labels[chosen])
        if self._config.mixup:
            order = torch.randperm(len(y), generator=generator)
            shares = self._shares(len(y), index, rank)
            x, y = mixup(x, x[order], shares), mixup(y, y[order], shares)
        return LabelledBatch(x, y)

    def _shares(self, num: int, *purpose: str | int) -> torch.Tensor:
        alpha, generator = self._config.mixup, numpy_generator(self._seed, *self._stream, "mixup", *purpose)
        return torch.from_numpy(generator.beta(alpha, alpha, num).astype(np.float32))

    def loss(self, model: nn.Module, batch: LabelledBatch) -> torch.Tensor:
        return F.cross_entropy(model(batch.x, batch.t, batch.x0), batch.y, label_smoothing=self._smoothing)

    def validate(self, model: PatchClassifier, device: torch.device) -> dict[str, float]:
        """Accuracy on the validation split, and the temperature fitted there, which is written into `model`. Training
        validates before it saves, so the last checkpoint is calibrated. At most 4,096 patches (or `validate_pairs`, if
        larger) are used, the same each time, equally many of every class. For states each temperature is fitted on
        `validate_pairs`. With mixup both figures are of mixtures, as in training: a temperature of unmixed patches
        would sharpen what mixup made linear."""
        if self._config.mixup:
            logits, targets = self._mixed_val_logits(model, device)
            bins, weights = np.zeros(len(logits), int), np.ones(len(logits))
        elif not self._states:
            logits = patch_logits(model, self._patches, self._val, device=device)
            targets, bins = self._labels[self._val], np.zeros(len(self._val), int)
            weights = balanced_weights(self._patches.labels[self._val])
        else:
            num = -(-self._config.train.validate_pairs * TIME_BINS // self._config.train.batch_size)
            logits, targets, bins = state_logits(model, map(self._states["val"].batch, range(num)), device=device)
            weights = np.ones(len(logits))
        for number in np.unique(bins):
            rows = bins == number
            model.temperature[number] = fit_temperature(logits[rows], targets[rows], weights[rows])
        # The weights in training get it too, so that averaging does not move it until the next validation.
        self.model.temperature.copy_(model.temperature)
        return {
            "val/accuracy": float((logits.argmax(1) == targets.argmax(1)).mean()),
            "val/temperature": model.temperature.mean().item(),
        }

    @torch.no_grad()
    def _mixed_val_logits(self, model: PatchClassifier, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Logits and soft labels (N, num_classes) of N mixtures of validation patches, classes drawn alike."""
        weights = balanced_weights(self._patches.labels[self._val])
        generator = numpy_generator(self._seed, *self._stream, "val")
        pairs = generator.choice(self._val, (2, len(self._val)), p=weights / weights.sum())
        shares = self._shares(pairs.shape[1], "val")
        parts = []
        for columns in torch.arange(pairs.shape[1]).split(_CHUNK):
            one, other = (images.encode(self._patches.centre(rows)) for rows in pairs[:, columns])
            parts.append(model.eval()(mixup(one, other, shares[columns]).to(device)).float().cpu())
        one, other = torch.from_numpy(self._labels[pairs])
        return torch.cat(parts).numpy(), mixup(one, other, shares).numpy()

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None


def _validation_patches(patches: Patches, *, most: int, seed: int) -> np.ndarray:
    """The validation split, or of a split of more than `most` patches at most equal shares of every class."""
    val = patches.indices("val")
    if len(val) <= most:
        return val
    share = most // len(patches.classes)
    return np.sort(np.concatenate([patches.sample("val", c, num=share, seed=seed) for c in patches.classes]))


def mixup(one: torch.Tensor, other: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Convex combinations, row by row, with shares (B,) of `one` (Zhang et al. 2018, eq. 1)."""
    return torch.lerp(other, one, shares.view(-1, *[1] * (one.ndim - 1)))


def _require_fit(model: PatchClassifier, config: Config) -> None:
    size = config.data.image_size
    seen, t = torch.zeros(1, config.data.channels, size, size), None
    if model.sees == "state":
        seen, t = build_codec(config).encode(seen), torch.zeros(1)
    try:
        with torch.no_grad():
            model.eval()(seen, t, seen if model.source_image else None)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"classifier.backbone={config.classifier.backbone}: cannot see patches of data.image_size={size} px "
            f"({error}); choose another timm model, such as a ResNet, or 'small'"
        ) from error
    finally:
        model.train()

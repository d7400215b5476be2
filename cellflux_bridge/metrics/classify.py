"""How many frames of one trajectory judges give to the target class, beside their accuracy on real patches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.scores import MOST_FOR_STATISTICS, image_scores
from cellflux_bridge.config import load_config
from cellflux_bridge.images.stain import fit_reference
from cellflux_bridge.metrics.networks import Network, load_networks
from cellflux_bridge.metrics.provenance import require_same_data
from cellflux_bridge.metrics.structure import recolour
from cellflux_bridge.trajectory import Trajectory, iter_trajectory, read_header


class FlipRate(NamedTuple):
    """By level of a trajectory: the fraction of frames whose most probable class is the target, and the mean
    probability of the target; `reinhard` is the same fraction for a mere colour transfer of the sources."""

    levels: tuple[float, ...]
    fraction: tuple[float, ...]
    probability: tuple[float, ...]
    reinhard: float
    num_sequences: int


class Classified(NamedTuple):
    """A judge, its `scores` on the real patches of its test split (`image_scores`), and its flip rate."""

    judge: Network
    scores: dict[str, float]
    rate: FlipRate

    def as_json(self) -> dict[str, Any]:
        """Its entry in classification.json."""
        of = {"classifier": str(self.judge.checkpoint), "view": self.judge.view}
        return {**of, **self.scores, **self.rate._asdict()}


def classify(
    folder: Path, runs: Sequence[Path], *, overrides: Sequence[str] = (), device: torch.device
) -> Iterator[Classified]:
    """The newest classifier of each run, applied to a trajectory folder; `overrides` apply to its configuration.

    Raises UserError, as `evaluate` does, for a guide, for frames of other data or of another size than a judge's, and
    for a judge that was trained on one of the sources.
    """
    header = read_header(folder)
    require_same_data([folder], runs, overrides)
    uses = [("judge", run) for run in runs]
    for judge in load_networks(uses, source=header.source, target=header.target, overrides=overrides, device=device):
        config, patches = load_config(judge.checkpoint / checkpoint.CONFIG, overrides), judge.patches
        targets = patches.sample("train", header.target, num=MOST_FOR_STATISTICS, seed=config.seed)
        rate = flip_rate(
            _fair(folder, judge),
            partial(inference.predict, judge.model, device=device),
            classes=patches.classes,
            real_targets=patches.centre(targets).permute(0, 2, 3, 1).numpy(),
        )
        scores = image_scores(judge.model, patches, device=device, labels=config.classifier.labels)
        yield Classified(judge, scores, rate)


def _fair(folder: Path, judge: Network) -> Iterator[Trajectory]:
    """The batches of a trajectory folder whose sources a judge may judge."""
    for batch in iter_trajectory(folder):
        judge.require_fair(batch.source_ids, batch.frames[0], where=str(folder))
        yield batch


def flip_rate(
    batches: Iterable[Trajectory],
    predict: Callable[[torch.Tensor], np.ndarray],
    *,
    classes: tuple[str, ...],
    real_targets: np.ndarray,
) -> FlipRate:
    """The flip rate of a trajectory by `predict`: uint8 patches (N, 3, H, W) to probabilities (N, num_classes).

    `classes` is the classifier's own order. `real_targets` (N, H, W, 3) uint8 are real patches of the target class,
    to whose mean colour statistics each source is transferred (Reinhard et al. 2001) for comparison.
    """
    reference = fit_reference("reinhard", list(real_targets))
    hits, probabilities, recoloured = [], [], []
    for batch in batches:
        target = classes.index(batch.header.target)
        k, b = batch.frames.shape[:2]
        p = predict(torch.from_numpy(batch.frames.reshape(k * b, *batch.frames.shape[2:]))).reshape(k, b, -1)
        hits.append(p.argmax(2) == target)
        probabilities.append(p[:, :, target])
        sources = np.ascontiguousarray(recolour(batch.frames[0], reference))
        recoloured.append(predict(torch.from_numpy(sources)).argmax(1) == target)
    if not hits:
        raise UserError("no whole sequence to judge; let `cellflux-bridge translate` finish first")
    return FlipRate(
        levels=batch.levels,
        fraction=tuple(np.concatenate(hits, axis=1).mean(1).tolist()),
        probability=tuple(np.concatenate(probabilities, axis=1).mean(1).tolist()),
        reinhard=float(np.concatenate(recoloured).mean()),
        num_sequences=sum(map(len, recoloured)),
    )

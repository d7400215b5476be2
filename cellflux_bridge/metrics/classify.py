"""Flip rates of one trajectory by judges, beside the accuracy of the judges on real patches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.scores import MOST_FOR_STATISTICS, image_scores
from cellflux_bridge.config import load_config
from cellflux_bridge.images.stain import fit_reference
from cellflux_bridge.metrics.networks import Network, load_networks
from cellflux_bridge.metrics.provenance import require_same_data
from cellflux_bridge.metrics.structure import recolour
from cellflux_bridge.trajectory import iter_trajectory, read_header


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
        config = load_config(judge.checkpoint / checkpoint.CONFIG, overrides)
        rate = flip_rate(folder, judge, seed=config.seed)
        scores = image_scores(judge.model, judge.patches, device=device, labels=config.classifier.labels)
        yield Classified(judge, scores, rate)


def flip_rate(folder: Path, judge: Network, *, seed: int) -> FlipRate:
    """The flip rate of a trajectory folder. For comparison each source gets the mean colours of real target patches of
    the training split (Reinhard et al. 2001), drawn by the seed."""
    targets = judge.patches.sample("train", judge.target, num=MOST_FOR_STATISTICS, seed=seed)
    reference = fit_reference("reinhard", list(judge.patches.centre(targets).permute(0, 2, 3, 1).numpy()))
    found, recoloured = [], []
    for batch in iter_trajectory(folder):
        judge.require_fair(batch.source_ids, batch.frames[0], where=str(folder))
        outputs = judge.outputs(batch.frames.reshape(-1, *batch.frames.shape[2:]), where=str(folder))
        found.append(np.stack([outputs.is_target, outputs.value]).reshape(2, len(batch.levels), -1))
        sources = np.ascontiguousarray(recolour(batch.frames[0], reference))
        recoloured.append(judge.outputs(sources, where="recoloured sources").is_target)
    if not found:
        raise UserError(f"{folder}: no whole sequence to judge; let `cellflux-bridge translate` finish first")
    fraction, probability = np.concatenate(found, axis=2).mean(2).tolist()
    reinhard = np.concatenate(recoloured)
    return FlipRate(batch.levels, tuple(fraction), tuple(probability), float(reinhard.mean()), len(reinhard))

"""What judges call the frames of one trajectory, each beside its accuracy on real patches."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.scores import MOST_FOR_STATISTICS, image_scores
from cellflux_bridge.config import load_config
from cellflux_bridge.metrics.flip import FlipRate, flip_rate
from cellflux_bridge.metrics.networks import Network, load_networks
from cellflux_bridge.metrics.provenance import require_same_data
from cellflux_bridge.trajectory import Trajectory, iter_trajectory, read_header


@dataclass(frozen=True)
class Classified:
    """A judge, its `scores` on the real patches of its test split (`image_scores`) and what it calls the frames."""

    judge: Network
    scores: dict[str, float]
    rate: FlipRate

    def as_json(self) -> dict[str, Any]:
        """Its entry in classification.json."""
        return {
            "classifier": str(self.judge.checkpoint),
            "view": self.judge.view,
            **self.scores,
            **asdict(self.rate),
        }


def classify(
    folder: Path, runs: Sequence[Path], *, overrides: Sequence[str] = (), device: torch.device
) -> Iterator[Classified]:
    """What the newest classifier of each run makes of a trajectory folder; `overrides` apply to its configuration.

    Raises UserError, as `evaluate` does, for a guide, for frames of other data or of another size than a judge's, and
    for a judge that trained on one of the sources.
    """
    header = read_header(folder)
    require_same_data([folder], runs, overrides)
    judges = load_networks(
        [("judge", run) for run in runs],
        source=header.source,
        target=header.target,
        overrides=overrides,
        device=device,
    )
    for judge in judges:
        config = load_config(judge.checkpoint / checkpoint.CONFIG, overrides)
        patches = judge.patches
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
        judge.require_fair(batch.source_ids, batch.frames[0], origin=str(folder))
        yield batch

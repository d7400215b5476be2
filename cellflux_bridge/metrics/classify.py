"""Flip rates of one trajectory by judges, beside the accuracy of the judges on real patches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.classifier.scores import image_scores
from cellflux_bridge.config import load_config
from cellflux_bridge.metrics.loading import load_networks, require_same_data
from cellflux_bridge.metrics.networks import Network
from cellflux_bridge.metrics.sequences import no_sequence
from cellflux_bridge.metrics.structure import recolour
from cellflux_bridge.trajectory import iter_trajectory, read_header


def classify(
    folder: Path, runs: Sequence[Path], *, overrides: Sequence[str] = (), device: torch.device
) -> Iterator[dict[str, Any]]:
    """The newest classifier of each run, applied to a trajectory folder: the judge's entry in classification.json, with
    its `image_scores` on the test split and its `flip_rate`. `overrides` apply to its configuration.

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
        yield {"classifier": str(judge.checkpoint), "view": judge.view, **scores, **rate}


def flip_rate(folder: Path, judge: Network, *, seed: int) -> dict[str, Any]:
    """By level of a trajectory: the fraction of frames whose most probable class is the target, and the mean
    probability of the target; `reinhard` is the same fraction for a mere colour transfer of the sources, which takes
    `Network.stain_reference` with the seed."""
    reference, found, recoloured = judge.stain_reference(seed=seed), [], []
    for batch in iter_trajectory(folder):
        judge.require_fair(batch.source_ids, batch.frames[0], where=str(folder))
        outputs = judge.outputs(batch.frames, where=str(folder))
        found.append(np.stack([outputs.is_target, outputs.value]))
        sources = np.ascontiguousarray(recolour(batch.frames[0], reference))
        recoloured.append(judge.outputs(sources, where="recoloured sources").is_target)
    if not found:
        raise no_sequence(folder)
    fraction, probability = np.concatenate(found, axis=2).mean(2).tolist()
    reinhard = np.concatenate(recoloured)
    rates = {"levels": batch.levels, "fraction": fraction, "probability": probability}
    return {**rates, "reinhard": float(reinhard.mean()), "num_sequences": len(reinhard)}

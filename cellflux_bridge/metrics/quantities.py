"""Every figure of the sequences of one method or baseline, compared to a reference set."""

from typing import Any

import numpy as np

from cellflux_bridge.base.statistics import Estimate, rank_correlation
from cellflux_bridge.metrics import progression
from cellflux_bridge.metrics.fidelity import frechet_distance, kid, kid_by_level, neighbourhoods
from cellflux_bridge.metrics.memorisation import NearestTraining
from cellflux_bridge.metrics.networks import Network, RealPatches
from cellflux_bridge.metrics.realism import add_realism
from cellflux_bridge.metrics.reference_set import NUM_SUBSAMPLES, ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.structure import TISSUE, stain_share, with_networks
from cellflux_bridge.metrics.values import Recorder

_NUM_OTHERS = 256


def add_figures(of: Sequences, reference: ReferenceSet, *, recoloured: Sequences) -> list[dict[str, Any]]:
    """Record all quantities of `metrics.words` that a method has by itself; returns its near copies of training
    patches as rows of metrics.json. `recoloured` is the stain transfer of its own sources."""
    record, extractor = reference.recorder(of), reference.extractor
    features, groups = of.outputs[extractor.name].features, extractor.groups_of_sources(of.source_ids)
    nearest_training = reference.training.nearest_to(features[:, 1:])
    for judge in reference.judges:
        _add_judged(record, of, judge)
    for network in (*reference.judges, extractor):
        _add_way(record, of, network, reference)
        _add_pooled(record, of, network, reference)
        _add_stain_share(record, of, network, recoloured)
    for number, (level, frame_level) in enumerate(zip(of.levels, of.frame_levels, strict=True), start=1):
        _add_set(record, "own", features[:, number], groups, reference.own(frame_level), reference, level=level)
    _add_set(record, "target", features[:, -1], groups, reference.target, reference, level=of.levels[-1])
    add_realism(record, of, reference)
    frames = features[:, 1:].reshape(-1, features.shape[-1])  # as one set
    of_all = record._replace(n=len(frames))
    _add_set(of_all, "pooled", frames, np.repeat(groups, len(of.levels)), reference.pooled, reference)
    if reference.estimator is not None:
        error = np.abs(of.outputs[reference.estimator.name].value[:, 1:] - np.array(of.frame_levels))
        record("severity_error", error, by=reference.estimator)
        record("severity_error", lambda i: error[i].mean(), by=reference.estimator)
    options = {"by": extractor, "n_real": min(map(len, reference.training.held_out))}
    copied = nearest_training.is_near_copy().T
    record("nearest_training_ratio", nearest_training.ratio, **options)
    record("nearest_training_closer", nearest_training.closer().T, **options)
    record("near_copy_share", copied, **options)
    record("near_copy_share", lambda i: copied[i].mean(), **options)
    for figure, each in zip(TISSUE, np.moveaxis(of.arrays["tissue"], 2, 0), strict=True):
        record(figure, each)
    for figure, each, by in with_networks(of.arrays["structure"][:, 1:], extractor):
        record(figure, each, by=by)
    if of.folder is not None:  # no baseline
        record.add("nfe", of.arrays["nfe"].mean())
        record.add("gradients", of.arrays["gradients"].mean())
    if of.cost is not None:
        record.add("seconds", of.cost.seconds)
        if of.cost.cpu_seconds is not None:
            record.add("cpu_seconds", of.cost.cpu_seconds)
    return _near_copies(of, reference, nearest_training)


def _add_judged(record: Recorder, of: Sequences, judge: Network) -> None:
    p, is_target, _ = of.outputs[judge.name]
    levels = np.array(of.frame_levels)
    record("flip_rate", is_target, by=judge)
    record("probability", p, by=judge)
    record("calibration_mean", lambda i: progression.calibration_of_means(p[i], levels), by=judge)
    record("calibration_image", progression.calibration_of_images(p, levels), by=judge)
    record("monotone_share", progression.is_monotone(p), by=judge)
    record("rank_correlation", rank_correlation(p, (0.0, *levels)), by=judge)


def _add_way(record: Recorder, of: Sequences, network: Network, reference: ReferenceSet) -> None:
    own, others, num_others = source_distances(of, network, reference)
    record("preservation", lambda i: own[i].mean(0) / others[i].mean(0), by=network, n_real=num_others)
    for measure in (progression.path_over_straight, progression.largest_over_mean_step):
        # A sequence that stands still has neither figure, and a mean over the others alone would hide it.
        record(measure.__name__, measure(of.outputs[network.name].features), by=network)


def _add_stain_share(record: Recorder, of: Sequences, network: Network, recoloured: Sequences) -> None:
    transferred = recoloured.outputs[network.name].features[:, -1]
    whole, explained = stain_share(of.outputs[network.name].features, transferred)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where nothing changes
        record("stain_share", lambda i: explained[i].sum(0) / whole[i].sum(0), by=network)


def source_distances(of: Sequences, network: Network, reference: ReferenceSet) -> tuple[np.ndarray, np.ndarray, int]:
    """Feature distances of every frame (N, K+1) to its own source, and to a random real source-class patch of another
    group (the mean over at most 256, and how many these are)."""
    real, features = reference.real[network.name], of.outputs[network.name].features
    chosen = reference.generator("others").permutation(np.flatnonzero(~real.is_target))[:_NUM_OTHERS]
    groups = {"groups": network.groups_of_sources(of.source_ids), "other_groups": real.groups[chosen]}
    others = progression.distance_to_others(features, real.features[chosen], **groups)
    return progression.distance_to_source(features), others, len(chosen)


def _add_pooled(record: Recorder, of: Sequences, network: Network, reference: ReferenceSet) -> None:
    real = reference.real[network.name]
    found = kid_by_level(
        of.outputs[network.name].features,
        real.features,
        groups=network.groups_of_sources(of.source_ids),
        real_groups=real.groups,
        num_subsamples=NUM_SUBSAMPLES,
        generator=reference.generator("kid", "pooled"),
    )
    over = [Estimate(*(number - reference.kid_floors[network.name].mean for number in one)) for one in found]
    worst = max(over[1:], key=lambda one: one.value)
    for quantity, each in (("kid_pooled", found), ("kid_pooled_over_floor", over), ("kid_pooled_over_floor", worst)):
        record.add(quantity, each, by=network, n_real=len(real.numbers))


def kid_to(
    frames: np.ndarray, groups: np.ndarray, real: RealPatches, reference: ReferenceSet, *, num_subsamples: int = 0
) -> Estimate:
    """KID of frames (N, D), in the extractor's features, to real patches; the same draws for all sets of one size."""
    draw = reference.generator("kid", "own")
    options = {"groups": groups, "real_groups": real.groups, "num_subsamples": num_subsamples, "generator": draw}
    return kid(frames, real.features, **options)


def _add_set(
    record: Recorder, to: str, frames: np.ndarray, groups: np.ndarray, real: RealPatches, reference, *, level=None
) -> None:
    """KID (of a level), Frechet distance and the four figures of neighbourhoods of frames (N, D) to real patches."""
    found = {} if level is None else {"kid": kid_to(frames, groups, real, reference, num_subsamples=NUM_SUBSAMPLES)}
    found["frechet"] = frechet_distance(frames, real.features)
    near = neighbourhoods(frames, real.features, groups=groups, real_groups=real.groups)
    for (figure, each), own in zip(near._asdict().items(), (groups, real.groups) * 2, strict=True):
        found[figure] = reference.mean(each, own)
    for figure, each in found.items():
        record.add(f"{figure}_{to}", each, level=level, by=reference.extractor, n_real=len(real.features))


def _near_copies(of: Sequences, reference: ReferenceSet, found: NearestTraining) -> list[dict[str, Any]]:
    least = found.least()
    return [
        {
            "method": of.name,
            "trajectory": str(of.folder or ""),
            "source_id": of.source_ids[n],
            "level": of.levels[k],
            "training_id": reference.training.ids[found.numbers[k, n]],
            "distance": float(found.distances[k, n]),
            "held_out": float(least[k, n]),
        }
        for k, n in np.argwhere(found.is_near_copy())
    ]

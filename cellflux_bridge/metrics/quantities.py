"""Every figure of one method's sequences before a panel of networks."""

import numpy as np

from cellflux_bridge.base.statistics import Estimate, Resamples, estimate, rank_correlation
from cellflux_bridge.metrics import progression
from cellflux_bridge.metrics.fidelity import frechet_distance, kid, kid_by_level
from cellflux_bridge.metrics.manifold import neighbourhoods
from cellflux_bridge.metrics.memorisation import NearCopy, NearestTraining
from cellflux_bridge.metrics.networks import Network
from cellflux_bridge.metrics.reference_set import NUM_SUBSAMPLES, ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.structure import FIGURES as STRUCTURE
from cellflux_bridge.metrics.structure import stain_share
from cellflux_bridge.metrics.tissue import FIGURES
from cellflux_bridge.metrics.values import Subject, Values

_NUM_OTHERS = 256


def subject(of: Sequences) -> Subject:
    return Subject(of.name, len(of.source_ids), of.folder, of.levels, of.split)


def add_figures(
    values: Values, of: Sequences, panel: ReferenceSet, *, recoloured: Sequences, memory: NearestTraining
) -> None:
    """All quantities of `metrics.evaluate` that a method has by itself; `recoloured` is the stain transfer of its own
    sources, `memory` that of its frames (`memory_of`)."""
    resamples = panel.resamples(panel.groups(of.source_ids))
    for judge in panel.judges:
        _add_judged(values, of, judge, resamples)
    for network in (*panel.judges, panel.extractor):
        _add_way(values, of, network, panel, resamples)
        _add_pooled(values, of, network, panel)
        _add_stain_share(values, of, network, recoloured, resamples)
    for number, level in enumerate(of.frame_levels, start=1):
        _add_distances(values, of, "own", number, panel.own_reference(level), panel)
    _add_distances(values, of, "target", len(of.levels), panel.target_reference(), panel)
    _add_all_frames(values, of, panel)
    if panel.estimator is not None:
        _add_severity(values, of, panel.estimator, resamples)
    _add_memory(values, of, panel, memory, resamples)
    for number, figure in enumerate(FIGURES):
        column = of.tissue[:, :, number]
        values.add_levels(subject(of), figure, estimate(lambda i, column=column: column[i].mean(0), resamples))
    for number, figure in enumerate(STRUCTURE):
        column, by = of.structure[:, 1:, number], panel.extractor if figure == "layer_distance" else None
        values.add_levels(subject(of), figure, estimate(lambda i, column=column: column[i].mean(0), resamples), by=by)
    for quantity, counts in (("nfe", of.nfe), ("gradients", of.gradients)):
        if counts is not None:
            values.add(subject(of), quantity, counts.mean())
    if of.cost is not None:
        values.add(subject(of), "seconds", of.cost.seconds)
        if of.cost.cpu_seconds is not None:
            values.add(subject(of), "cpu_seconds", of.cost.cpu_seconds)


def _add_judged(values: Values, of: Sequences, judge: Network, resamples: Resamples) -> None:
    seen, levels = of.seen[judge.name], np.array(of.frame_levels)
    p, is_target = seen.value, seen.is_target
    values.add_levels(subject(of), "flip_rate", estimate(lambda i: is_target[i].mean(0), resamples), by=judge)
    values.add_levels(subject(of), "probability", estimate(lambda i: p[i].mean(0), resamples), by=judge)
    means = estimate(lambda i: progression.calibration_of_means(p[i], levels), resamples)
    values.add(subject(of), "calibration_mean", means, by=judge)
    for quantity, each in (
        ("calibration_image", progression.calibration_of_images(p, levels)),
        ("monotone_share", progression.is_monotone(p)),
        ("rank_correlation", rank_correlation(p, (0.0, *levels))),
    ):
        values.add(subject(of), quantity, estimate(lambda i, each=each: each[i].mean(), resamples), by=judge)


def _add_way(values: Values, of: Sequences, network: Network, panel: ReferenceSet, resamples: Resamples) -> None:
    own, others, num_others = source_distances(of, network, panel)
    found = estimate(lambda i: own[i].mean(0) / others[i].mean(0), resamples)
    values.add_levels(subject(of), "preservation", found, by=network, n_real=num_others)
    features = of.seen[network.name].features
    for measure in (progression.path_over_straight, progression.largest_over_mean_step):
        each = measure(features)
        # A sequence that stands still has neither figure, and a mean over the others alone would hide it.
        found = estimate(lambda i, each=each: each[i].mean(), resamples)
        values.add(subject(of), measure.__name__, found, by=network)


def _add_stain_share(
    values: Values, of: Sequences, network: Network, recoloured: Sequences, resamples: Resamples
) -> None:
    transferred = recoloured.seen[network.name].features[:, -1]
    whole, explained = stain_share(of.seen[network.name].features, transferred)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where nothing changes
        found = estimate(lambda i: explained[i].sum(0) / whole[i].sum(0), resamples)
    values.add_levels(subject(of), "stain_share", found, by=network)


def memory_of(of: Sequences, panel: ReferenceSet) -> NearestTraining:
    """The frames after the source beside the training patches."""
    return panel.training.memory(of.seen[panel.extractor.name].features[:, 1:])


def _add_memory(
    values: Values, of: Sequences, panel: ReferenceSet, memory: NearestTraining, resamples: Resamples
) -> None:
    fewest = min(map(len, memory.held_out))
    copied, closer = memory.is_near_copy().T, memory.closer().T
    for quantity, found in (
        ("nearest_training_ratio", estimate(memory.ratio, resamples)),
        ("nearest_training_closer", estimate(lambda i: closer[i].mean(0), resamples)),
        ("near_copy_share", estimate(lambda i: copied[i].mean(0), resamples)),
    ):
        values.add_levels(subject(of), quantity, found, by=panel.extractor, n_real=fewest)
    found = estimate(lambda i: copied[i].mean(), resamples)
    values.add(subject(of), "near_copy_share", found, by=panel.extractor, n_real=fewest)


def near_copies(of: Sequences, panel: ReferenceSet, memory: NearestTraining) -> list[NearCopy]:
    """The near copies of a method, those that lie the farthest below held-out patches first."""
    least = memory.least()
    found = [
        NearCopy(
            of.name,
            str(of.folder or ""),
            of.source_ids[n],
            of.levels[number],
            panel.training.ids[memory.numbers[number, n]],
            float(memory.distances[number, n]),
            float(least[number, n]),
        )
        for number, n in np.argwhere(memory.is_near_copy())
    ]
    return sorted(found, key=lambda copy: copy.share)


def source_distances(of: Sequences, network: Network, panel: ReferenceSet) -> tuple[np.ndarray, np.ndarray, int]:
    """Feature distances of every frame (N, K+1) to its own source, and to a random real source-class patch of another
    group (the mean over at most 256, and how many these are)."""
    real, features = panel.real[network.name], of.seen[network.name].features
    chosen = panel.generator("others").permutation(np.flatnonzero(~real.patches.is_target))[:_NUM_OTHERS]
    others = progression.distance_to_others(
        features,
        real.seen.features[chosen],
        groups=network.groups_of_sources(of.source_ids),
        other_groups=real.patches.groups[chosen],
    )
    return progression.distance_to_source(features), others, len(chosen)


def _add_pooled(values: Values, of: Sequences, network: Network, panel: ReferenceSet) -> None:
    real = panel.real[network.name]
    found = kid_by_level(
        of.seen[network.name].features,
        real.seen.features,
        groups=network.groups_of_sources(of.source_ids),
        real_groups=real.patches.groups,
        num_subsamples=NUM_SUBSAMPLES,
        generator=panel.generator("kid", "pooled"),
    )
    over = [Estimate(*(number - real.floor.mean for number in one)) for one in found]
    worst = max(over[1:], key=lambda one: one.value)
    num_real = len(real.patches.numbers)
    values.add_levels(subject(of), "kid_pooled", found, by=network, n_real=num_real)
    values.add_levels(subject(of), "kid_pooled_over_floor", over, by=network, n_real=num_real)
    values.add(subject(of), "kid_pooled_over_floor", worst, by=network, n_real=num_real)


def own_distances(
    of: Sequences,
    number: int,
    reference: tuple[np.ndarray, np.ndarray],
    panel: ReferenceSet,
    *,
    num_subsamples: int = 0,
) -> tuple[Estimate, float]:
    """KID and Frechet distance of the frames of a number to real patches, in the extractor's features."""
    frames, (features, groups) = of.seen[panel.extractor.name].features[:, number], reference
    distance = kid(
        frames,
        features,
        groups=panel.extractor.groups_of_sources(of.source_ids),
        real_groups=groups,
        num_subsamples=num_subsamples,
        generator=panel.generator("kid", "own"),
    )
    return distance, frechet_distance(frames, features)


def _add_distances(values: Values, of: Sequences, to: str, number: int, reference, panel: ReferenceSet) -> None:
    distance, frechet = own_distances(of, number, reference, panel, num_subsamples=NUM_SUBSAMPLES)
    frames, groups = of.seen[panel.extractor.name].features[:, number], panel.extractor.groups_of_sources(of.source_ids)
    found = {"kid": distance, "frechet": frechet, **_near(frames, groups, reference, panel)}
    for figure, estimated in found.items():
        level, num_real = of.levels[number - 1], len(reference[0])
        values.add(subject(of), f"{figure}_{to}", estimated, level=level, by=panel.extractor, n_real=num_real)


def _near(frames: np.ndarray, groups: np.ndarray, reference, panel: ReferenceSet) -> dict[str, Estimate]:
    """The figures of `metrics.manifold` of frames (N, D) among real patches, features and groups."""
    near = neighbourhoods(frames, reference[0], groups=groups, real_groups=reference[1])
    by = (groups, reference[1]) * 2
    return {figure: panel.mean(each, own) for (figure, each), own in zip(near._asdict().items(), by, strict=True)}


def _add_all_frames(values: Values, of: Sequences, panel: ReferenceSet) -> None:
    """All frames after the sources, as one set, against the real patches of both classes."""
    features = of.seen[panel.extractor.name].features[:, 1:]
    groups = np.repeat(panel.extractor.groups_of_sources(of.source_ids), features.shape[1])
    frames, reference = features.reshape(-1, features.shape[-1]), panel.pooled_reference()
    found = {"frechet": frechet_distance(frames, reference[0]), **_near(frames, groups, reference, panel)}
    whole = subject(of)._replace(n=len(frames))
    for figure, estimated in found.items():
        values.add(whole, f"{figure}_pooled", estimated, by=panel.extractor, n_real=len(reference[0]))


def _add_severity(values: Values, of: Sequences, estimator: Network, resamples: Resamples) -> None:
    error = np.abs(of.seen[estimator.name].value[:, 1:] - np.array(of.frame_levels))
    values.add_levels(subject(of), "severity_error", estimate(lambda i: error[i].mean(0), resamples), by=estimator)
    values.add(subject(of), "severity_error", estimate(lambda i: error[i].mean(), resamples), by=estimator)

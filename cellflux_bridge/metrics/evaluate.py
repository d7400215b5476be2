"""The figures of trajectories: every method at the same levels, by the same networks, beside its baselines and floors.

Quantities (one `Value` each, per level where it says so; a KID or Frechet distance belongs to its extractor alone):

flip_rate (level)               share of frames that a judge gives to the target class before all others
probability (level)             mean p(target class) of a judge
calibration_mean                mean over levels of |mean p - s_k|
calibration_image               mean over images and levels of |p - s_k|
monotone_share                  share of sequences whose p never falls by more than 0.02 from frame to frame
rank_correlation                mean over sequences of Spearman's correlation of p with the level, from three frames on
preservation (level)            mean feature distance to the own source / to real source-class patches of other groups
path_over_straight              mean over sequences of the way's length in features over the distance of its ends
largest_over_mean_step          mean over sequences of the largest step over the mean one
kid_pooled (level)              KID to real source- and target-class patches together
kid_pooled_over_floor (level)   the same less the mean of the real-vs-real floor; without a level: the worst after 0
kid_own, frechet_own (level)    distance, in the extractor's features, to real patches of the own score, or else class
stain_share (level)             share of the squared feature change from the source that a mere stain transfer of it
                                (Reinhard, to real targets) explains, in part or whole (`metrics.structure`)
ms_ssim (level)                 MS-SSIM of the haematoxylin to the own source; of real source: between different groups
layer_distance (level)          LPIPS-like distance to the own source in the extractor's layers (`metrics.structure`)
nearest_training_ratio (level)  median distance to the nearest training patch over that of real held-out patches near to
                                patches of its class (`metrics.memorisation`)
nearest_training_closer (level) chance that a frame lies nearer to training than a held-out patch; 0.5 is none
near_copy_share (level)         share of frames nearer to training than all M held-out patches; 1 / (M + 1) by chance;
                                without a level of all frames after the source
cycle_preservation, cycle_ms_ssim, cycle_layer_distance    distances of sources to themselves, carried to the target
                                and back (the first over the source's own to random others)
kid_target, frechet_target      the same of level 1 to real target patches
precision_own, recall_own, density_own, coverage_own (level) and *_target: see `metrics.manifold`, in the extractor's
                                features, to the same real patches; recall and coverage have intervals over these
frechet_pooled, precision_pooled, recall_pooled, density_pooled, coverage_pooled    the same of all n frames after the
                                sources as one set, to real source- and target-class patches together
severity_error (level)          mean |severity estimate - s_k|; without a level over all levels
nfe, gradients                  means of a sequence
seconds, cpu_seconds            wall and CPU time a sequence, on the method's device; the second of a CPU alone
haematoxylin_area, contrast, fine_detail (level)    see `metrics.tissue`
guidance_kid_ratio, guidance_frechet_ratio (level)  kid_own and frechet_own with guidance over without, on common
                                sources; without a level the mean of the levels' ratios, and *_of_means the ratio of the
                                levels' means, which a level near 0 does not rule

Of real patches: kid_floor, frechet_floor, precision_floor, recall_floor, density_floor and coverage_floor (mean over
random halves by group, `n` against `n_real` patches; `low` and `high` their 95 % range) and *_floor_spread (standard
deviations) of both classes together ("real pooled"), of target patches ("real target") and, by level, of the patches
that the *_own figures of this level compare to ("real own"; of a frame that stands for the level at another soft label,
those of the level all the same); probability, flip_rate, severity_error and the tissue figures. A Frechet distance of
half as many patches is larger: its floor lies above what all of them would give.
A value that does not exist (a ratio to a distance that is not above 0, an interval of a Frechet distance) is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.metrics.comparisons import Difference, add_guidance, differences
from cellflux_bridge.metrics.cycle import add_cycle
from cellflux_bridge.metrics.extractor import is_name
from cellflux_bridge.metrics.feature_cache import FeatureCache
from cellflux_bridge.metrics.memorisation import NearCopy
from cellflux_bridge.metrics.networks import Network, load_networks
from cellflux_bridge.metrics.provenance import require_same_data
from cellflux_bridge.metrics.quantities import add_figures, memory_of, near_copies
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences, collect, copied_source, nearest_target, stain_transfer
from cellflux_bridge.metrics.values import Value, Values
from cellflux_bridge.metrics.warnings import cautions, incomplete, repeated
from cellflux_bridge.trajectory import read_header


@dataclass(frozen=True)
class Evaluation:
    """All figures of some trajectories, and what they were made with; methods and baselines in the table's order.

    `unguided` names, for a guided method, the one that it was compared to; `warnings` say in plain words what not to
    believe.
    """

    source: str
    target: str
    num_levels: int
    seed: int
    max_real: int
    networks: tuple[Network, ...]
    methods: tuple[Sequences, ...]
    baselines: tuple[Sequences, ...]
    unguided: dict[str, str]
    values: tuple[Value, ...]
    differences: tuple[Difference, ...]
    near_copies: tuple[NearCopy, ...]
    num_training: int
    num_held_out: tuple[int, int]
    warnings: tuple[str, ...]


def _names(folders: Sequence[Path], unguided: Sequence[Path]) -> list[str]:
    """What each trajectory is called in the table: its method, and its folder where that does not tell them apart."""
    methods = [read_header(folder).method for folder in folders]
    short = [f"{m}, unguided" if f in unguided else m for m, f in zip(methods, folders, strict=True)]
    longer = [f"{m} ({f.name})" if short.count(m) > 1 else m for m, f in zip(short, folders, strict=True)]
    return [n if longer.count(n) == 1 else f"{m} ({f})" for n, m, f in zip(longer, short, folders, strict=True)]


def _require_same_transition(folders: Sequence[Path]) -> tuple[str, str]:
    found = [(header.source, header.target) for header in map(read_header, folders)]
    for folder, transition in zip(folders, found, strict=True):
        if transition != found[0]:
            raise UserError(
                f"{folder}: {' -> '.join(transition)}, but {folders[0]} is {' -> '.join(found[0])}; methods are "
                "compared on one transition, evaluate the others by themselves"
            )
    return found[0]


def evaluate(
    trajectories: Sequence[Path],
    *,
    judges: Sequence[Path],
    features: Path | str,
    scores: Path | None = None,
    unguided: Sequence[Path] = (),
    cycle: Path | None = None,
    num_levels: int = 10,
    overrides: Sequence[str] = (),
    max_real: int = 10_000,
    seed: int = 0,
    device: torch.device,
    cache: Path | None = None,
) -> Evaluation:
    """All figures of trajectory folders of one transition; the first is compared with each other one by source.

    `judges` are runs of classifiers, `features` of one that neither guided nor judges or an extractor's name
    (`metrics.extractor`); `scores` of one trained with classifier.labels=score on patches of the whole range, whose p
    is the severity of a frame. `unguided` are trajectories of the same method as one of the others, made unguided;
    they are evaluated, too. `cycle` is a trajectory that carries a method's last frames back. Of the real patches of
    either class, and of those with a score, at most `max_real` are compared to, drawn by the seed. What networks make
    of images is kept in the folder `cache` (`metrics.feature_cache`). Raises UserError for a guide among the networks,
    and for trajectories and networks that do not fit each other.

    Time grows with the number of training patches, and with the square of the frames' and of the real patches' number,
    up to `max_real`.
    """
    if num_levels < 1:
        raise UserError(f"--levels {num_levels}: expected at least one level after the source")
    if max_real < 1:
        raise UserError(f"--max-real {max_real}: expected how many real patches of a class to use at most, 1 or more")
    folders = [*trajectories, *unguided]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a trajectory is named twice; name each once, as a trajectory or with --unguided")
    source, target = _require_same_transition(folders)
    methods = [read_header(folder).method for folder in trajectories]
    for folder in unguided:
        if (method := read_header(folder).method) not in methods:
            raise UserError(f"--unguided {folder}: its method {method} is none of {', '.join(methods)}; name its rival")
    features = features if is_name(str(features)) else Path(features)
    runs = [*(("judge", run) for run in judges), ("features", features)]
    runs += [("scores", scores)] if scores is not None else []
    own_runs = [*judges, *([features] if isinstance(features, Path) else [])]
    require_same_data(folders, own_runs, overrides)
    networks = load_networks(
        runs, source=source, target=target, overrides=overrides, device=device, cache=FeatureCache(cache)
    )
    names = _names(folders, unguided)
    looked = [
        collect(folder, networks, name=name, num_levels=num_levels) for folder, name in zip(folders, names, strict=True)
    ]
    values = Values()
    panel = ReferenceSet(networks, levels=looked[0].levels, seed=seed, max_real=max_real, values=values)
    reference = panel.stain_reference()
    recoloured = [stain_transfer(sequences, networks, reference) for sequences in looked]
    baselines = [
        copied_source(looked[0], panel.extractor),
        recoloured[0],
        nearest_target(looked[0], networks, panel.extractor),
    ]
    baselines = [sequences for sequences in baselines if sequences is not None]
    transfers = [*recoloured, *recoloured[:1] * len(baselines)]
    copies: list[NearCopy] = []
    for sequences, transfer in zip((*looked, *baselines), transfers, strict=True):
        memory = memory_of(sequences, panel)
        add_figures(values, sequences, panel, recoloured=transfer, memory=memory)
        if sequences.folder is not None:  # no baseline
            copies += near_copies(sequences, panel, memory)
    if cycle is not None:
        add_cycle(values, looked, cycle, panel)
    rivals = {}
    for without in looked[len(trajectories) :]:
        for guided in looked[: len(trajectories)]:
            if guided.header.method == without.header.method:
                add_guidance(values, guided, without, panel)
                rivals[guided.name] = without.name
    return Evaluation(
        source=source,
        target=target,
        num_levels=num_levels,
        seed=seed,
        max_real=max_real,
        networks=tuple(networks),
        methods=tuple(looked),
        baselines=tuple(baselines),
        unguided=rivals,
        values=tuple(values.rows),
        differences=tuple(row for other in looked[1:] for row in differences(looked[0], other, panel)),
        near_copies=tuple(copies),
        num_training=len(panel.training.ids),
        num_held_out=tuple(map(len, panel.training.held_out)),
        warnings=(*incomplete(folders), *repeated(panel.training.num_repeated), *cautions(values.rows)),
    )

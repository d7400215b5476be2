"""All figures of trajectories: every method at the same levels, by the same networks, beside its baselines and floors.

`metrics.words` lists and explains the quantities.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.metrics import realism
from cellflux_bridge.metrics.comparisons import add_cycle, add_guidance, differences, match_cycle
from cellflux_bridge.metrics.loading import is_name, load_networks, require_same_data
from cellflux_bridge.metrics.quantities import add_figures
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences, collect, copied_source, nearest_target, stain_transfer
from cellflux_bridge.metrics.warnings import data_warnings, figure_warnings, learned_by
from cellflux_bridge.trajectory import TrajectoryHeader, iter_trajectory, read_header, read_source_ids

# At how many levels methods are compared, where trajectories have as many.
_NUM_LEVELS = 10


class Evaluation(NamedTuple):
    """All figures of some trajectories (`reference.rows`), in the order of methods and baselines of the table.

    `unguided` maps a guided method to the unguided one that it is compared to; `differences` and `near_copies` are rows
    of metrics.json (`metrics.results`); `warnings` are sentences about figures that mislead.
    """

    reference: ReferenceSet
    methods: list[Sequences]
    baselines: list[Sequences]
    unguided: dict[str, str]
    differences: list[dict[str, Any]]
    near_copies: list[dict[str, Any]]
    warnings: list[str]


def _names(headers: dict[Path, TrajectoryHeader], unguided: Sequence[Path]) -> dict[Path, str]:
    """The name of each trajectory in the table: its method, and its folder where two methods are the same."""
    short = {folder: of.method + (", unguided" if folder in unguided else "") for folder, of in headers.items()}
    longer = {f: n if [*short.values()].count(n) == 1 else f"{n} ({f.name})" for f, n in short.items()}
    return {f: n if [*longer.values()].count(n) == 1 else f"{short[f]} ({f})" for f, n in longer.items()}


def _transition(headers: dict[Path, TrajectoryHeader]) -> tuple[str, str]:
    """The source and the target class of all trajectories; UserError where they differ."""
    (first, of), *others = headers.items()
    for folder, other in others:
        if (other.source, other.target) != (of.source, of.target):
            raise UserError(
                f"{folder}: {other.source} -> {other.target}, but {first} is {of.source} -> {of.target}; methods are "
                "compared on one transition, evaluate the others by themselves"
            )
    return of.source, of.target


def _guided_pairs(
    trajectories: Sequence[Path], unguided: Sequence[Path], headers: dict[Path, TrajectoryHeader]
) -> list[tuple[Path, Path]]:
    """Each guided trajectory with the unguided one of its method; UserError where there is none of its sources."""
    pairs = []
    for without in unguided:
        method, ids = headers[without].method, set(read_source_ids(without))
        guided = [folder for folder in trajectories if headers[folder].method == method]
        if not guided:
            methods = ", ".join(headers[folder].method for folder in trajectories)
            raise UserError(f"--unguided {without}: its method {method} is none of {methods}; name its guided one, too")
        for folder in guided:
            if ids.isdisjoint(read_source_ids(folder)):
                raise UserError(
                    f"--unguided {without}: none of its sources is one of {folder}; translate the same ones"
                )
            pairs.append((folder, without))
    return pairs


def require_rgb(folder: Path) -> None:
    """UserError for sequences of other than three channels."""
    first = next(iter_trajectory(folder, batch_size=1), None)
    if first is not None and (num := first.frames.shape[2]) != 3:
        raise UserError(f"{folder}: {num} channels; evaluate's figures are of RGB images only")


def evaluate(
    trajectories: Sequence[Path],
    *,
    judges: Sequence[Path],
    features: Path | str,
    scores: Path | None = None,
    unguided: Sequence[Path] = (),
    cycle: Path | None = None,
    num_levels: int | None = None,
    overrides: Sequence[str] = (),
    max_real: int = 10_000,
    seed: int = 0,
    device: torch.device,
    cache: Path | None = None,
) -> Evaluation:
    """All figures of trajectory folders of one transition; the first is compared with each other one by source.

    judges       runs of classifiers
    features     run of a classifier that neither guided nor judges, or an extractor's name (`metrics.loading`), such as
                 nuclei
    scores       run of a classifier trained with classifier.labels=score on patches of the whole range: its p is the
                 severity of a frame
    unguided     trajectories of the same method as one of the others, made without guidance; they are evaluated, too
    num_levels   how many levels methods are compared at; None: 10, or as few as one of the trajectories has
    cycle        trajectory that carries the last frames of a method back
    max_real     at most so many real patches of a class, or with a score, are used; the seed draws them
    cache        folder that keeps the outputs of networks (`networks.remember`)

    Raises UserError for a guide among the networks, and for trajectories and networks that do not fit each other.
    Time grows with the number of training patches, and with the square of the numbers of frames and of real patches.
    """
    for flag, value, of in (("levels", num_levels, "levels after the source"), ("max-real", max_real, "real patches")):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: expected how many {of} to use, 1 or more")
    folders = [*trajectories, *unguided]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a trajectory is named twice; name each once, as a trajectory or with --unguided")
    headers = {folder: read_header(folder) for folder in folders}
    source, target = _transition(headers)
    num_levels = num_levels or min(_NUM_LEVELS, *(len(header.levels) - 1 for header in headers.values()))
    pairs = _guided_pairs(trajectories, unguided, headers)
    require_same_data(folders, [*judges, *([] if is_name(str(features)) else [Path(features)])], overrides)
    runs = [*(("judge", run) for run in judges), ("features", features)]
    runs += [("scores", scores)] if scores is not None else []
    networks = load_networks(runs, source=source, target=target, overrides=overrides, device=device, cache=cache)
    names = _names(headers, unguided)
    for folder in folders:
        require_rgb(folder)
    looked = {of: collect(of, networks, name=names[of], num_levels=num_levels) for of in folders}
    methods = list(looked.values())
    there_and_back = None if cycle is None else match_cycle(methods, cycle, networks)
    reference = ReferenceSet(networks, levels=methods[0].levels, seed=seed, max_real=max_real)
    realism.add_floors(reference, methods[0].levels)
    realism.add_damage(reference)
    stain = reference.extractor.stain_reference(seed=seed)
    recoloured = [stain_transfer(sequences, networks, stain) for sequences in methods]
    baselines = [copied_source(methods[0], networks), recoloured[0], *nearest_target(methods[0], networks)]
    copies = []
    for sequences, transfer in zip(methods, recoloured, strict=True):
        copies += add_figures(sequences, reference, recoloured=transfer)
    for sequences in baselines:
        add_figures(sequences, reference, recoloured=recoloured[0])
    if there_and_back is not None:
        add_cycle(*there_and_back, reference)
    for guided, without in pairs:
        add_guidance(looked[guided], looked[without], reference)
    return Evaluation(
        reference=reference,
        methods=methods,
        baselines=baselines,
        unguided={names[guided]: names[without] for guided, without in pairs},
        differences=[row for other in methods[1:] for row in differences(methods[0], other, reference)],
        near_copies=copies,
        warnings=[
            *data_warnings(folders, reference.training.num_repeated),
            *learned_by(folders, str(features)),
            *figure_warnings(reference.rows),
        ],
    )

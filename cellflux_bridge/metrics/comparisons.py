"""Methods against methods on their common sources; guidance against no guidance; sources against themselves, carried to
the target and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import paired_difference
from cellflux_bridge.metrics import progression
from cellflux_bridge.metrics.fidelity import frechet_distance
from cellflux_bridge.metrics.networks import Network
from cellflux_bridge.metrics.quantities import kid_to, source_distances
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences, collect
from cellflux_bridge.metrics.structure import with_networks
from cellflux_bridge.trajectory import read_header


def _common(first: Sequences, second: Sequences, keys: Sequence, of_second: Sequence) -> tuple[Sequences, Sequences]:
    """The sequences whose keys both have, in the order of `first`."""
    places = {key: n for n, key in enumerate(of_second)}
    chosen = [n for n, key in enumerate(keys) if key in places]
    return first.rows(chosen), second.rows([places[keys[n]] for n in chosen])


def differences(first: Sequences, second: Sequences, reference: ReferenceSet) -> list[dict[str, Any]]:
    """Rows (`metrics.results`) of all figures that each source has by itself; none where no source is common."""
    first, second = _common(first, second, first.source_ids, second.source_ids)
    if not first.source_ids:
        return []
    groups, resamples = reference.groups(first.source_ids), reference.recorder(first).resamples
    others, rows = _figures_of_sources(second, reference), []
    for (quantity, extractor), values in _figures_of_sources(first, reference).items():
        paired = paired_difference(values, others[quantity, extractor], groups, resamples=resamples)
        row = {"first": first.name, "second": second.name, "quantity": quantity, "extractor": extractor}
        rows.append({**row, "n": len(values), **paired._asdict()})
    return rows


def _figures_of_sources(of: Sequences, reference: ReferenceSet) -> dict[tuple[str, str], np.ndarray]:
    """(N,) of each quantity and network; of preservation the mean over levels of each source's own ratio."""
    levels, figures = np.array(of.frame_levels), {}
    for judge in reference.judges:
        p, is_target, _ = of.outputs[judge.name]
        figures["flip_rate", judge.name] = is_target[:, -1]
        figures["calibration_image", judge.name] = progression.calibration_of_images(p, levels)
        figures["monotone_share", judge.name] = progression.is_monotone(p)
    for network in (*reference.judges, reference.extractor):
        own, others, _ = source_distances(of, network, reference)
        figures["preservation", network.name] = (own / others)[:, 1:].mean(1)
    if reference.estimator is not None:
        name = reference.estimator.name
        figures["severity_error", name] = progression.calibration_of_images(of.outputs[name].value, levels)
    return figures


def add_guidance(guided: Sequences, unguided: Sequences, reference: ReferenceSet) -> None:
    """KID and Frechet distance to real patches of the own level, with guidance over without, on common sources."""
    pair = _common(guided, unguided, guided.source_ids, unguided.source_ids)
    found = np.empty((2, 2, len(guided.levels)))  # KID or Frechet, with or without, level
    for number, level in enumerate(guided.frame_levels):
        real = reference.own(level)
        for column, of in enumerate(pair):
            frames = of.outputs[reference.extractor.name].features[:, number + 1]
            groups = reference.extractor.groups_of_sources(of.source_ids)
            found[0, column, number] = kid_to(frames, groups, real, reference).value
            found[1, column, number] = frechet_distance(frames, real.features)
    record = reference.recorder(pair[0])
    for kind, (above, below) in zip(("kid", "frechet"), found, strict=True):
        quantity, ratios = f"guidance_{kind}_ratio", [_ratio(*each) for each in zip(above, below, strict=True)]
        record.add(quantity, ratios, by=reference.extractor)
        record.add(quantity, float(np.mean(ratios)), by=reference.extractor)
        record.add(f"{quantity}_of_means", _ratio(above.mean(), below.mean()), by=reference.extractor)


def _ratio(above: float, below: float) -> float:
    """NaN where a distance is not above 0, as an unbiased estimate may be: the ratio then says nothing."""
    return float(above / below) if min(above, below) > 0 else float("nan")


def match_cycle(methods: Sequence[Sequences], folder: Path, networks: Sequence[Network]) -> tuple[Sequences, Sequences]:
    """The sequences of a method whose last frames are first frames of the trajectory in `folder`, and these of its own.

    Frames are matched pixel by pixel. Raises UserError where the trajectory does not lead back, or starts from no
    method's last frames.
    """
    header, source, target = read_header(folder), networks[0].source, networks[0].target
    if (header.source, header.target) != (target, source):
        way = f"{header.source} -> {header.target}"
        raise UserError(f"--cycle {folder}: {way}; expected the way back of {source} -> {target}")
    back = collect(folder, networks, name=f"{folder.name}, back", num_levels=1, fair=False)
    for of in methods:
        pixels = ([image.tobytes() for image in images] for images in (back.arrays["sources"], of.arrays["last"]))
        returned, chosen = _common(back, of, *pixels)
        if returned.source_ids:
            return chosen, returned
    raise UserError(
        f"--cycle {folder}: none of its first frames is a last frame of {', '.join(of.name for of in methods)}; "
        "translate the last frames themselves: Bridge.translate(torch.from_numpy(trajectory.frames[-1]), ...)"
    )


def add_cycle(of: Sequences, back: Sequences, reference: ReferenceSet) -> None:
    """Record the figures of `match_cycle`."""
    record = reference.recorder(of)
    for network in (*reference.judges, reference.extractor):
        start, end = of.outputs[network.name].features[:, 0], back.outputs[network.name].features[:, -1]
        own, others = np.linalg.norm(end - start, axis=1), source_distances(of, network, reference)[1][:, 0]
        record("cycle_preservation", lambda i, own=own, others=others: own[i].mean() / others[i].mean(), by=network)
    both = np.stack([of.arrays["sources"], back.arrays["last"]], axis=1)
    for figure, each, by in with_networks(reference.extractor.structure(both)[:, 1], reference.extractor):
        record(f"cycle_{figure}", each, by=by)

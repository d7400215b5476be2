"""Cycle error: how far a source that was carried to the target and back again is from itself."""

import hashlib
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.statistics import estimate
from cellflux_bridge.metrics.quantities import source_distances, subject
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences, collect
from cellflux_bridge.metrics.structure import FIGURES
from cellflux_bridge.metrics.values import Values
from cellflux_bridge.trajectory import read_header


def add_cycle(values: Values, methods: list[Sequences], folder: Path, panel: ReferenceSet) -> None:
    """Cycle figures of the method whose last frames are the first ones of the trajectory in `folder`, pixel by pixel.

    Raises UserError where it does not lead back or starts from no method's last frames.
    """
    header, forward = read_header(folder), methods[0].header
    if (header.source, header.target) != (forward.target, forward.source):
        raise UserError(
            f"--cycle {folder}: {header.source} -> {header.target}; expected the way back of "
            f"{forward.source} -> {forward.target}"
        )
    back = collect(folder, panel.networks, name=f"{folder.name}, back", num_levels=1, fair=False)
    for of in methods:
        places = {digest: number for number, digest in enumerate(_digests(of.last))}
        pairs = [(places[digest], n) for n, digest in enumerate(_digests(back.sources)) if digest in places]
        if pairs:
            rows, found = np.array(pairs).T
            _add(values, of.rows(rows), back.rows(found), panel)
            return
    raise UserError(
        f"--cycle {folder}: none of its first frames is a last frame of {', '.join(of.name for of in methods)}; "
        "translate the last frames themselves: Bridge.translate(torch.from_numpy(trajectory.frames[-1]), ...)"
    )


def _digests(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes()).digest() for image in images]


def _add(values: Values, of: Sequences, back: Sequences, panel: ReferenceSet) -> None:
    resamples = panel.resamples(panel.groups(of.source_ids))
    for network in (*panel.judges, panel.extractor):
        features = of.seen[network.name].features
        own = np.linalg.norm(back.seen[network.name].features[:, -1] - features[:, 0], axis=1)
        others = source_distances(of, network, panel)[1][:, 0]
        found = estimate(lambda i, own=own, others=others: own[i].mean() / others[i].mean(), resamples)
        values.add(subject(of), "cycle_preservation", found, by=network)
    figures = panel.extractor.structure(np.stack([of.sources, back.last], axis=1))[:, 1]
    for figure, each in zip(FIGURES, figures.T, strict=True):
        by = panel.extractor if figure == "layer_distance" else None
        values.add(subject(of), f"cycle_{figure}", estimate(lambda i, each=each: each[i].mean(), resamples), by=by)

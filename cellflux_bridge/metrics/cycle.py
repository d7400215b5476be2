"""Cycle error: how far a source is from itself after it was carried to the target and back."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.metrics.networks import Network
from cellflux_bridge.metrics.quantities import source_distances
from cellflux_bridge.metrics.reference_set import ReferenceSet
from cellflux_bridge.metrics.sequences import Sequences, collect
from cellflux_bridge.metrics.structure import with_networks
from cellflux_bridge.trajectory import read_header


def match_cycle(methods: Sequence[Sequences], folder: Path, networks: Sequence[Network]) -> tuple[Sequences, Sequences]:
    """The sequences of a method whose last frames are first frames of the trajectory in `folder`, and these of its own.

    Frames are matched pixel by pixel. Raises UserError where the trajectory does not lead back, or starts from no
    method's last frames.
    """
    header, forward = read_header(folder), methods[0].header
    if (header.source, header.target) != (forward.target, forward.source):
        raise UserError(
            f"--cycle {folder}: {header.source} -> {header.target}; expected the way back of "
            f"{forward.source} -> {forward.target}"
        )
    back = collect(folder, networks, name=f"{folder.name}, back", num_levels=1, fair=False)
    for of in methods:
        places = {digest: number for number, digest in enumerate(_digests(of.arrays["last"]))}
        pairs = [(places[d], n) for n, d in enumerate(_digests(back.arrays["sources"])) if d in places]
        if pairs:
            rows, found = np.array(pairs).T
            return of.rows(rows), back.rows(found)
    raise UserError(
        f"--cycle {folder}: none of its first frames is a last frame of {', '.join(of.name for of in methods)}; "
        "translate the last frames themselves: Bridge.translate(torch.from_numpy(trajectory.frames[-1]), ...)"
    )


def _digests(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes()).digest() for image in images]


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

"""One pass over a trajectory: what every network makes of its frames, at the levels on which methods are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.images.stain import StainReference
from cellflux_bridge.metrics.cost import Cost, read_cost
from cellflux_bridge.metrics.memorisation import nearest
from cellflux_bridge.metrics.networks import Network, NetworkOutputs
from cellflux_bridge.metrics.structure import recolour
from cellflux_bridge.metrics.tissue import tissue_figures
from cellflux_bridge.metrics.warnings import NEAREST_TARGET
from cellflux_bridge.trajectory import TrajectoryHeader, iter_trajectory, read_header

_BATCH = 32


@dataclass(frozen=True)
class Sequences:
    """N sequences of frames 0..K, frame 0 the source, as networks see them.

    `levels` (K,) are the names k/K of the levels after the source, `frame_levels` (K,) the soft labels of the frames
    that stand for them. `seen[network]` holds (N, K+1) values and (N, K+1, D) features; `tissue` (N, K+1, 3) the
    figures of `metrics.tissue`, `structure` (N, K+1, 2) those of `metrics.structure`, to the source. `sources` and
    `last` (N, 3, S, S) uint8 are the frames 0 and K. `split` is that of the sources (`metrics.values`).
    `nfe`, `gradients` (N,) and `cost` are None where nothing was translated or it is not known.
    """

    name: str
    folder: Path | None
    header: TrajectoryHeader
    levels: tuple[float, ...]
    frame_levels: tuple[float, ...]
    source_ids: tuple[str, ...]
    split: str
    seen: dict[str, NetworkOutputs]
    tissue: np.ndarray
    structure: np.ndarray
    sources: np.ndarray
    last: np.ndarray
    nfe: np.ndarray | None = None
    gradients: np.ndarray | None = None
    cost: Cost | None = None

    def rows(self, chosen: np.ndarray) -> "Sequences":
        """The sequences of the given numbers."""
        return replace(
            self,
            source_ids=tuple(self.source_ids[i] for i in chosen),
            seen={name: seen.at(chosen) for name, seen in self.seen.items()},
            tissue=self.tissue[chosen],
            structure=self.structure[chosen],
            sources=self.sources[chosen],
            last=self.last[chosen],
            nfe=None if self.nfe is None else self.nfe[chosen],
            gradients=None if self.gradients is None else self.gradients[chosen],
        )


def choose_frames(levels: Sequence[float], num: int, *, folder: Path) -> list[int]:
    """Numbers of the frames that stand for the levels 1/num .. 1, frame 0 before them.

    All, where a trajectory has just as many; else the nearest ones, of two as near the earlier. UserError where one
    frame would stand for two.
    """
    if len(levels) == num + 1:
        return list(range(num + 1))
    rising = np.asarray(levels, np.float64)
    chosen = [0, *(int(np.abs(rising - k / num).round(9).argmin()) for k in range(1, num + 1))]
    if len(set(chosen)) < len(chosen):
        raise UserError(
            f"{folder}: its {len(levels) - 1} levels are too few or too unequal to stand for {num}; give --levels "
            f"{len(levels) - 1} or fewer"
        )
    return chosen


def collect(folder: Path, networks: Sequence[Network], *, name: str, num_levels: int, fair: bool = True) -> Sequences:
    """The sequences of a trajectory folder as all networks see them; of the inner frames only that stays in memory.

    The extractor tells their structure. `fair`: whether sources are real patches, which no network may have trained
    on. Raises UserError for an empty or damaged trajectory, frames of another size than a network's, and a network that
    trained on a source or sees it otherwise.
    """
    header = read_header(folder)
    chosen = choose_frames(header.levels, num_levels, folder=folder)
    extractor = next(network for network in networks if network.use == "features")
    ids, tissue, structure, ends, nfe, gradients = [], [], [], [], [], []
    seen = {network.name: [] for network in networks}
    bar = progress(iter_trajectory(folder, batch_size=_BATCH), desc=f"looking at {name}", unit="batch")
    for batch in bar:
        frames = np.ascontiguousarray(batch.frames[chosen].swapaxes(0, 1))
        flat, shape = frames.reshape(-1, *frames.shape[2:]), frames.shape[:2]
        for network in networks:
            if fair:
                network.require_fair(batch.source_ids, batch.frames[0], origin=str(folder))
            looked = network.look(flat, origin=str(folder))
            seen[network.name].append(looked.map(lambda array, shape=shape: array.reshape(*shape, *array.shape[1:])))
        tissue.append(tissue_figures(flat).reshape(*shape, -1))
        structure.append(extractor.structure(frames))
        ends.append(frames[:, [0, -1]])
        ids += batch.source_ids
        nfe += batch.nfe
        gradients += batch.gradients
    if not ids:
        raise UserError(f"{folder}: no whole sequence to judge; let `cellflux-bridge translate` finish first")
    return Sequences(
        name=name,
        folder=folder,
        header=header,
        levels=tuple((k + 1) / num_levels for k in range(num_levels)),
        frame_levels=tuple(header.levels[i] for i in chosen[1:]),
        source_ids=tuple(ids),
        split=extractor.split_of(ids),
        seen={key: NetworkOutputs.cat(parts) for key, parts in seen.items()},
        tissue=np.concatenate(tissue),
        structure=np.concatenate(structure),
        sources=np.concatenate([both[:, 0] for both in ends]),
        last=np.concatenate([both[:, 1] for both in ends]),
        nfe=np.array(nfe),
        gradients=np.array(gradients),
        cost=read_cost(folder),
    )


def copied_source(sequences: Sequences, extractor: Network) -> Sequences:
    """The baseline that changes nothing: the source at every level."""
    sources = {name: seen.at(np.s_[:, 0]) for name, seen in sequences.seen.items()}
    return _still(sequences, "copy the source", sources, sequences.tissue[:, 0], sequences.sources, extractor)


def nearest_target(sequences: Sequences, networks: Sequence[Network], extractor: Network) -> Sequences | None:
    """The baseline that looks one up: at every level the real target patch nearest to the source in the extractor's
    features, of the validation split, which no network was trained on; None where that split holds none."""
    candidates = extractor.patches.indices("val", extractor.target)
    if len(candidates) == 0:
        return None
    seen = {network.name: network.look_at_patches(extractor.patches, candidates) for network in networks}
    own = sequences.seen[extractor.name].features[:, 0]
    _, chosen = nearest(own, seen[extractor.name].features)
    patches = extractor.patches.centre(candidates[chosen]).numpy()
    images = {name: s.at(chosen) for name, s in seen.items()}
    return _still(sequences, NEAREST_TARGET, images, tissue_figures(patches), patches, extractor)


def stain_transfer(sequences: Sequences, networks: Sequence[Network], reference: StainReference) -> Sequences:
    """The baseline that changes nothing but colour: at every level the source in the stain of real targets."""
    extractor = next(network for network in networks if network.use == "features")
    parts = [sequences.sources[i : i + _BATCH] for i in range(0, len(sequences.sources), _BATCH)]
    patches = np.concatenate(
        [recolour(part, reference) for part in progress(parts, desc="stain transfer", leave=False)]
    )
    images = {network.name: network.look(patches, origin="recoloured sources") for network in networks}
    return _still(sequences, "stain transfer", images, tissue_figures(patches), patches, extractor)


def _still(
    sequences: Sequences,
    name: str,
    images: dict[str, NetworkOutputs],
    tissue: np.ndarray,
    patches: np.ndarray,
    extractor: Network,
) -> Sequences:
    """Sequences whose frames after the source are all the same image: `patches` (N, 3, S, S) and what is known of
    them, (N, ...)."""
    num = len(sequences.levels)

    def follow(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.concatenate([first[:, :1], np.repeat(rest[:, None], num, axis=1)], axis=1)

    seen = {
        key: NetworkOutputs(
            follow(own.value, images[key].value),
            follow(own.is_target, images[key].is_target),
            follow(own.features, images[key].features),
        )
        for key, own in sequences.seen.items()
    }
    return replace(
        sequences,
        name=name,
        folder=None,
        frame_levels=sequences.levels,
        seen=seen,
        tissue=follow(sequences.tissue, tissue),
        structure=follow(
            sequences.structure, extractor.structure(np.stack([sequences.sources, patches], axis=1))[:, 1]
        ),
        last=patches,
        nfe=None,
        gradients=None,
        cost=None,
    )

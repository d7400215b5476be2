"""One pass over a trajectory: the outputs of every network for its frames, at the levels where methods are compared."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.images.stain import StainReference
from cellflux_bridge.metrics.bands import statistics
from cellflux_bridge.metrics.cost import Cost, read_cost
from cellflux_bridge.metrics.memorisation import nearest
from cellflux_bridge.metrics.networks import Network, NetworkOutputs, extractor_of
from cellflux_bridge.metrics.structure import recolour, tissue_figures
from cellflux_bridge.metrics.warnings import NEAREST_TARGET
from cellflux_bridge.trajectory import TrajectoryHeader, iter_trajectory, read_header

_BATCH = 32


@dataclass(frozen=True)
class Sequences:
    """N sequences of frames 0..K, frame 0 the source, with what was computed of each frame.

    `levels` (K,) are the names k/K of the levels after the source, `frame_levels` (K,) the soft labels of the frames
    that stand for them. `outputs[network]` holds (N, K+1) values and (N, K+1, D) features. `arrays` holds, of
    `metrics.structure`, "tissue" (N, K+1, 3) and "structure" (N, K+1, 2, to the source); "bands" (N, K+1, 48) of
    `metrics.bands`; "steps" (N, K), the mean change of a pixel from frame to frame in grey levels; "sources" and "last"
    (N, 3, S, S) uint8, the frames 0 and K; and, of sequences that were translated, "nfe" and "gradients" (N,). `split`
    is that of the sources (`metrics.values`); `cost` is None where it is not known.
    """

    name: str
    folder: Path | None
    header: TrajectoryHeader
    levels: tuple[float, ...]
    frame_levels: tuple[float, ...]
    source_ids: tuple[str, ...]
    split: str
    outputs: dict[str, NetworkOutputs]
    arrays: dict[str, np.ndarray]
    cost: Cost | None = None

    def rows(self, chosen: Sequence[int]) -> "Sequences":
        """The sequences of the given numbers."""
        return replace(
            self,
            source_ids=tuple(self.source_ids[i] for i in chosen),
            outputs={name: outputs.at(chosen) for name, outputs in self.outputs.items()},
            arrays={name: array[chosen] for name, array in self.arrays.items()},
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
    """The sequences of a trajectory folder with the outputs of all networks; inner frames do not stay in memory.

    The extractor measures their structure. Raises UserError for an empty or damaged trajectory and, where `fair`, for
    what `Network.require_fair` refuses.
    """
    header = read_header(folder)
    chosen = choose_frames(header.levels, num_levels, folder=folder)
    extractor = extractor_of(networks)
    ids, outputs, arrays = [], defaultdict(list), defaultdict(list)
    for batch in progress(iter_trajectory(folder, batch_size=_BATCH), desc=f"looking at {name}", unit="batch"):
        frames = np.ascontiguousarray(batch.frames[chosen].swapaxes(0, 1))
        for network in networks:
            if fair:
                network.require_fair(batch.source_ids, batch.frames[0], where=str(folder))
            outputs[network.name].append(network.outputs(frames, where=str(folder)))
        computed = {
            "tissue": tissue_figures(frames.reshape(-1, *frames.shape[2:])).reshape(*frames.shape[:2], -1),
            "structure": extractor.structure(frames),
            "bands": statistics(frames.reshape(-1, *frames.shape[2:])).reshape(*frames.shape[:2], -1),
            "steps": _pixel_steps(frames),
            "sources": frames[:, 0].copy(),
            "last": frames[:, -1].copy(),
            "nfe": np.array(batch.nfe),
            "gradients": np.array(batch.gradients),
        }
        for key, array in computed.items():
            arrays[key].append(array)
        ids += batch.source_ids
    if not ids:
        raise no_sequence(folder)
    return Sequences(
        name=name,
        folder=folder,
        header=header,
        levels=tuple((k + 1) / num_levels for k in range(num_levels)),
        frame_levels=tuple(header.levels[i] for i in chosen[1:]),
        source_ids=tuple(ids),
        split=extractor.split_of(ids),
        outputs={key: NetworkOutputs.cat(parts) for key, parts in outputs.items()},
        arrays={key: np.concatenate(parts) for key, parts in arrays.items()},
        cost=read_cost(folder),
    )


def _pixel_steps(frames: np.ndarray) -> np.ndarray:
    """The mean absolute change of uint8 sequences (N, L, ...) from frame to frame, (N, L - 1)."""
    return np.abs(np.diff(frames.astype(np.int16), axis=1)).mean(tuple(range(2, frames.ndim)))


def no_sequence(folder: Path) -> UserError:
    return UserError(f"{folder}: no whole sequence to judge; let `cellflux-bridge translate` finish first")


def copied_source(sequences: Sequences, networks: Sequence[Network]) -> Sequences:
    """The baseline that changes nothing: the source at every level."""
    outputs = {name: each.at(np.s_[:, 0]) for name, each in sequences.outputs.items()}
    return _still(sequences, "copy the source", sequences.arrays["sources"], networks, outputs)


def nearest_target(sequences: Sequences, networks: Sequence[Network]) -> list[Sequences]:
    """The baseline of real images: at every level the real target patch nearest to the source in the extractor's
    features, of the validation split, on which no network was trained; none where that split holds none."""
    extractor = extractor_of(networks)
    candidates = extractor.patches.indices("val", extractor.target)
    if len(candidates) == 0:
        return []
    outputs = {network.name: network.outputs_of_patches(extractor.patches, candidates) for network in networks}
    _, chosen = nearest(sequences.outputs[extractor.name].features[:, 0], outputs[extractor.name].features)
    patches = extractor.patches.centre(candidates[chosen]).numpy()
    outputs = {name: each.at(chosen) for name, each in outputs.items()}
    return [_still(sequences, NEAREST_TARGET, patches, networks, outputs)]


def stain_transfer(sequences: Sequences, networks: Sequence[Network], reference: StainReference) -> Sequences:
    """The baseline that changes nothing but colour: at every level the source in the stain of real targets."""
    sources = sequences.arrays["sources"]
    starts = progress(range(0, len(sources), _BATCH), desc="stain transfer", leave=False)
    patches = np.concatenate([recolour(sources[start : start + _BATCH], reference) for start in starts])
    outputs = {network.name: network.outputs(patches, where="recoloured sources") for network in networks}
    return _still(sequences, "stain transfer", patches, networks, outputs)


def _still(sequences: Sequences, name: str, patches: np.ndarray, networks: Sequence[Network], outputs) -> Sequences:
    """Sequences whose frames after the source are one image: of `patches` (N, 3, S, S), with the networks' `outputs`
    (N, ...) by name."""
    num, before = len(sequences.levels), sequences.arrays

    def follow(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.concatenate([first[:, :1], np.repeat(rest[:, None], num, axis=1)], axis=1)

    both = np.stack([before["sources"], patches], axis=1)
    structure = extractor_of(networks).structure(both)[:, 1]
    return replace(
        sequences,
        name=name,
        folder=None,
        frame_levels=sequences.levels,
        outputs={key: NetworkOutputs(*map(follow, own, outputs[key])) for key, own in sequences.outputs.items()},
        arrays={
            "tissue": follow(before["tissue"], tissue_figures(patches)),
            "structure": follow(before["structure"], structure),
            "bands": follow(before["bands"], statistics(patches)),
            "steps": np.pad(_pixel_steps(both), ((0, 0), (0, num - 1))),
            "sources": before["sources"],
            "last": patches,
        },
        cost=None,
    )

"""The networks that frames are shown to: judges, an extractor that neither guided nor judges, a severity estimator."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.files import replacing
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.scores import MOST_FOR_STATISTICS
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.images import encode
from cellflux_bridge.images.stain import StainReference, fit_reference
from cellflux_bridge.metrics.bands import statistics
from cellflux_bridge.metrics.fidelity import require_finite
from cellflux_bridge.metrics.structure import haematoxylin_ms_ssim, layer_distance

_CHUNK = 256
_CACHE_FORMAT = 1  # goes up whenever the networks would give another answer
# Images of one forward; on a CPU more of them are slower, because of the memory that their feature maps take.
FORWARD = 64
# Above this mean absolute difference, in grey levels, a source is not the patch in the network's data.
_SAME_PATCH = 8.0


class NetworkOutputs(NamedTuple):
    """The outputs of a network for images.

    `value` (...) is p(target class), or of a severity estimator the severity in the direction of the target;
    `is_target` (...) whether the target is the most probable class; `features` (..., D) the input of its last layer. Of
    an extractor that is no classifier, `value` is NaN and `is_target` False.
    """

    value: np.ndarray
    is_target: np.ndarray
    features: np.ndarray

    def at(self, index) -> "NetworkOutputs":
        return NetworkOutputs(*(array[index] for array in self))

    @staticmethod
    def cat(parts: "Sequence[NetworkOutputs]") -> "NetworkOutputs":
        return NetworkOutputs(*map(np.concatenate, zip(*parts, strict=True)))


class RealPatches(NamedTuple):
    """Real test patches: `numbers` (M,) into a network's patches, group names, whether each is of the target; once a
    network has seen them, its `outputs`, and where they are compared to frames their `bands` (`metrics.bands`)."""

    numbers: np.ndarray
    groups: np.ndarray
    is_target: np.ndarray
    outputs: NetworkOutputs | None = None
    bands: np.ndarray | None = None

    @property
    def features(self) -> np.ndarray:
        return self.outputs.features

    def at(self, chosen: np.ndarray) -> "RealPatches":
        return RealPatches(*(array[chosen] for array in self[:3]), self.outputs.at(chosen), self.bands[chosen])


def remember(
    folder: Path | None, network: str, question: str, images: np.ndarray, answer: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of `answer()`, from a .npz file of the folder where it is there; None keeps nothing.

    The name of a file is the digest of the network's weights (`network`), the question and the pixels. So nothing stale
    is ever found, and the same images have one answer, whatever their files are called. The folder may be removed at
    any time.
    """
    if folder is None:
        return answer()
    asked = f"{_CACHE_FORMAT} {network} {question} {images.dtype} {images.shape}"
    key = hashlib.blake2b(asked.encode() + images.tobytes(), digest_size=20)
    path = folder / f"{key.hexdigest()}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: it is made anew
    found = answer()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as building, open(building, "wb") as file:
        np.savez(file, **found)
    return found


@dataclass(frozen=True)
class Network:
    """A trained classifier in one of the `loading.USES`, and the patches of its own configuration.

    `name` is unique; `weights` (C,) turn class probabilities into `NetworkOutputs.value`. An extractor that
    is no classifier has none, and the patches of the first judge. `checkpoint` is the folder of its weights, or the
    extractor's name; `digest` is a hash of the weights.
    """

    name: str
    use: str
    view: str
    checkpoint: Path | str
    patches: Patches
    source: str
    target: str
    weights: np.ndarray | None
    model: torch.nn.Module
    digest: str
    device: torch.device
    cache: Path | None

    @property
    def image_size(self) -> int:
        return self.patches.preprocessing.image_size

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of each of its patches by id."""
        return {source_id: number for number, source_id in enumerate(self.patches.ids)}

    def outputs(self, batch: np.ndarray | torch.Tensor, *, where: str) -> NetworkOutputs:
        """Of uint8 patches (..., 3, S, S); a UserError that names `where` they are from, if an output is not finite."""
        shape, batch = batch.shape[:-3], torch.as_tensor(batch).flatten(0, -4)

        def answer() -> dict[str, np.ndarray]:
            features = inference.features(self.model, batch, device=self.device, chunk=FORWARD)
            p = np.empty((len(batch), 0), np.float32)
            if self.weights is not None:
                p = inference.predict(self.model, batch, device=self.device, chunk=FORWARD)
            require_finite(np.column_stack([p, features]), name=f"{self.name}, looking at {where}")
            return {"p": p, "features": features}

        found = remember(self.cache, self.digest, "features", batch.numpy(), answer)
        p, features = found["p"], found["features"]
        value, is_target = np.full(len(p), np.nan), np.zeros(len(p), bool)
        if self.weights is not None:
            value, is_target = p @ self.weights, p.argmax(1) == self.patches.class_index(self.target)
        return NetworkOutputs(value.reshape(shape), is_target.reshape(shape), features.reshape(*shape, -1))

    def structure(self, frames: np.ndarray) -> np.ndarray:
        """Figures of `metrics.structure`, (N, L, 2), of uint8 sequences (N, L, 3, S, S) to their own first frames."""

        @torch.no_grad()
        def maps(batch: torch.Tensor) -> list[torch.Tensor]:
            return [one.float().cpu() for one in self.model.eval().feature_maps(encode(batch).to(self.device))]

        def answer() -> dict[str, np.ndarray]:
            return {"structure": np.stack([haematoxylin_ms_ssim(frames), layer_distance(frames, maps)], axis=2)}

        return remember(self.cache, self.digest, "structure", frames, answer)["structure"]

    def outputs_of_patches(self, patches: Patches, numbers: np.ndarray, *, desc: str = "real patches"):
        """`outputs` of the middle patches of a data set, never more than a chunk of them in memory."""
        starts = progress(range(0, len(numbers), _CHUNK), desc=f"{self.name}: {desc}", unit="batch", leave=False)
        chunks = (patches.centre(numbers[start : start + _CHUNK]) for start in starts)
        return NetworkOutputs.cat([self.outputs(chunk, where="real patches") for chunk in chunks])

    def groups_of_sources(self, source_ids: Sequence[str]) -> np.ndarray:
        """The group of each source; one that is not among the network's patches is a group of its own."""
        names, groups, known = self.patches.group_names, self.patches.groups, self._numbers
        return np.array([names[groups[known[each]]] if each in known else each for each in source_ids])

    def split_of(self, source_ids: Sequence[str]) -> str:
        """The split of the sources, several joined by a comma; "" where none of them is among the network's patches."""
        numbers = [self._numbers[source_id] for source_id in source_ids if source_id in self._numbers]
        return ", ".join((*SPLITS, "none")[split] for split in np.unique(self.patches.splits[numbers]))

    def real_patches(self, *, num: int | None = None, seed: int = 0) -> RealPatches:
        """At most `num` test patches of the source class and of the target class (None: all), drawn by the seed; for a
        severity estimator at most `num` of all test patches that have a score."""
        patches, scored = self.patches, self.use == "scores"
        if scored:
            numbers = patches.indices("test")
            sets = {"scored": numbers[np.isfinite(patches.scores[numbers])]}
        else:
            sets = {label: patches.indices("test", label) for label in (self.source, self.target)}
        draws = (numpy_generator(seed, "evaluate", "real", name).permutation(of)[:num] for name, of in sets.items())
        numbers = np.concatenate([*map(np.sort, draws)])
        is_target = patches.labels[numbers] == patches.class_index(self.target)
        if len(np.unique(is_target)) < (1 if scored else 2):
            wanted = "patches with a score" if scored else f"{self.source} and {self.target}"
            raise UserError(
                f"{self.name}: the test split of its data lacks {wanted}, to which frames are compared; raise "
                "data.split.test and train it again, or name splits in the data"
            )
        return RealPatches(numbers, np.array(patches.group_names)[patches.groups[numbers]], is_target)

    def stain_reference(self, *, seed: int) -> StainReference:
        """The mean colours of real target patches of the training split (Reinhard et al. 2001), drawn by the seed."""
        chosen = self.patches.sample("train", self.target, num=MOST_FOR_STATISTICS, seed=seed)
        return fit_reference("reinhard", list(self.patches.centre(chosen).permute(0, 2, 3, 1).numpy()))

    def require_fair(self, source_ids: Sequence[str], sources: np.ndarray, *, where: str) -> None:
        """UserError if it was trained on one of the sources (B, 3, S, S), or has them at another crop or stain.

        A severity estimator's data set is another one, whose files may bear the same names by chance.
        """
        if sources.shape[-2:] != (self.image_size,) * 2:
            raise UserError(
                f"{where}: frames of {sources.shape[-1]} x {sources.shape[-2]} px, {self.name} was trained on "
                f"{self.image_size} px; evaluate with classifiers of the frames' size (data.image_size)"
            )
        rows = [row for row, each in enumerate(source_ids) if each in self._numbers]
        if self.use == "scores" or not rows:
            return
        numbers = [self._numbers[source_ids[row]] for row in rows]
        real = self.patches.centre(numbers).numpy().astype(np.float32)
        if np.median(np.abs(real - sources[rows]).mean((1, 2, 3))) > _SAME_PATCH:
            raise UserError(
                f"{where}: its sources are not the patches that {self.name} knows under these names; its data must "
                "have the same data.root, data.crop and data.stain as the run that made the sequences"
            )
        trained = self.patches.splits[numbers] == SPLITS.index("train")
        if names := [source_ids[row] for row in np.array(rows)[trained]]:
            raise UserError(
                f"{self.name}: trained on sources of {where}: {abbreviate(names, limit=3)}; translate patches of the "
                "test split, and train classifiers with the flow's seed and data.split, which decide the splits"
            )


def bands_of(patches: Patches, numbers: np.ndarray) -> np.ndarray:
    """`metrics.bands.statistics` of the middle patches of a data set, (M, 48)."""
    parts = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    return np.concatenate([statistics(patches.centre(part).numpy()) for part in parts])


def extractor_of(networks: Sequence[Network]) -> Network:
    return next(network for network in networks if network.use == "features")

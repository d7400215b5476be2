"""Batches of coupled (source, target) patches, each a function of (seed, step, rank) alone."""

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple, Protocol

import numpy as np
import torch

from cellflux_bridge import images, stain
from cellflux_bridge.config import DataConfig, PairsConfig
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.errors import UserError
from cellflux_bridge.randomness import torch_generator

# Rows of a batch that share one group where pairs are matched by group, so that the coupling has a choice.
_ROWS_PER_GROUP = 8


class Coupling(Protocol):
    """What pairs the sources and targets of a batch: see `coupling.base`."""

    def pair(
        self, x0: torch.Tensor, x1: torch.Tensor, *, blocks: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class PairBatch(NamedTuple):
    """x0, x1 (B, 3, S, S) float32 in [-1, 1]; class numbers, scores of the targets (B,) float32, NaN where the data
    has none; and the patches' numbers in the data set, (B,) int64."""

    x0: torch.Tensor
    x1: torch.Tensor
    source_class: torch.Tensor
    target_class: torch.Tensor
    target_score: torch.Tensor
    source_index: torch.Tensor
    target_index: torch.Tensor


class Pairs:
    """Draws (source class, target class) first and evenly, then patches, then couples them inside each block.

    Raises UserError for a transition between unknown classes, and where a class, or a group that is to be matched,
    has too few patches.
    """

    def __init__(
        self,
        patches: Patches,
        coupling: Coupling,
        *,
        split: str,
        batch_size: int,
        seed: int,
        pairs: PairsConfig,
        data: DataConfig,
    ):
        self._patches, self._coupling, self._split = patches, coupling, split
        self._batch_size, self._seed, self._config, self._data = batch_size, seed, pairs, data
        self.transitions = [
            tuple(patches.class_index(label) for label in pair) for pair in named_transitions(patches.classes, pairs)
        ]
        rows = -(-batch_size // len(self.transitions))
        self._members = {}
        for number in sorted({c for pair in self.transitions for c in pair}):
            self._members[number] = patches.indices(split, patches.classes[number])
            have, label = len(self._members[number]), patches.classes[number]
            if split == "train" and have < rows:
                most = have * len(self.transitions)
                raise UserError(
                    f"train.batch_size={batch_size} draws {rows} patches of class {label!r} at once, but the training "
                    f"split has {have}: lower train.batch_size to at most {most}, or add patches"
                )
            if have == 0:
                raise UserError(f"class {label!r} has no patch in the {split} split; see `cellflux-bridge data check`")
        self._groups = {pair: self._shared_groups(pair) for pair in self.transitions} if pairs.match_group else None

    def _shared_groups(self, pair: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
        groups = self._patches.groups
        of = [{g: m[groups[m] == g] for g in np.unique(groups[m])} for m in (self._members[c] for c in pair)]
        shared = [(of[0][g], of[1][g]) for g in of[0] if g in of[1]]
        if not shared:
            names = " and ".join(repr(self._patches.classes[c]) for c in pair)
            raise UserError(
                f"pairs.match_group: no group of the {self._split} split holds both {names}; name groups (slide, "
                "plate, batch) in the manifest or set pairs.match_group=false"
            )
        return shared

    def batch(self, step: int, *, rank: int = 0) -> PairBatch:
        """The batch of a step: random crops, symmetries and stain jitter in training, middle crops elsewhere."""
        generator = torch_generator(self._seed, "pairs", self._split, step, rank)
        source, target, blocks = self._draw_indices(generator)
        if self._split == "train":
            flips = self._data.flips
            x0, x1 = (self._patches.random(i, flips=flips, generator=generator) for i in (source, target))
        else:
            x0, x1 = self._patches.centre(source), self._patches.centre(target)
        x0, x1 = images.encode(x0), images.encode(x1)
        if self._split == "train" and self._data.stain.mode == "augment":
            both = torch.stack([x0, x1], dim=1)
            both = stain.augment(both, strength=self._data.stain.strength, generator=generator)
            x0, x1 = both.unbind(1)
        i, j = self._coupling.pair(x0, x1, blocks=blocks, generator=generator)
        source, target = source[i], target[j]
        labels = torch.from_numpy(self._patches.labels)
        scores = torch.from_numpy(self._patches.scores[target])
        numbers = torch.from_numpy(source), torch.from_numpy(target)
        return PairBatch(x0[i], x1[j], labels[source], labels[target], scores, *numbers)

    def _draw_indices(self, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        order = torch.randperm(len(self.transitions), generator=generator).tolist()
        shares = np.array_split(np.arange(self._batch_size), len(order))
        source, target, blocks = [], [], []
        for transition, share in zip((self.transitions[k] for k in order), shares, strict=True):
            # A batch smaller than the number of transitions leaves some of them out.
            for pools, num in self._pools(transition, len(share), generator) if len(share) else ():
                source.append(_draw(pools[0], num, generator))
                target.append(_draw(pools[1], num, generator))
                blocks += [len(source)] * num
        return np.concatenate(source), np.concatenate(target), torch.tensor(blocks)

    def _pools(self, transition: tuple[int, int], num: int, generator: torch.Generator):
        if self._groups is None:
            return [((self._members[transition[0]], self._members[transition[1]]), num)]
        shared = self._groups[transition]
        weights = torch.tensor([float(min(len(a), len(b))) for a, b in shared])
        sizes = [len(part) for part in np.array_split(np.arange(num), -(-num // _ROWS_PER_GROUP))]
        chosen = torch.multinomial(weights, len(sizes), replacement=True, generator=generator).tolist()
        return [(shared[g], size) for g, size in zip(chosen, sizes, strict=True)]


def _draw(pool: np.ndarray, num: int, generator: torch.Generator) -> np.ndarray:
    """`num` of a pool, each once where the pool is large enough."""
    while num**2 <= len(pool):  # collisions are rare, and a permutation of millions is slow
        drawn = torch.randint(len(pool), (num,), generator=generator)
        if len(drawn.unique()) == num:
            return pool[drawn.numpy()]
    if num <= len(pool):
        return pool[torch.randperm(len(pool), generator=generator)[:num].numpy()]
    return pool[torch.randint(len(pool), (num,), generator=generator).numpy()]


def named_transitions(classes: Sequence[str], pairs: PairsConfig) -> list[tuple[str, str]]:
    """The (source, target) classes that a network is trained on, identity pairs at the end."""
    if pairs.transitions == "all":
        found = list(permutations(classes, 2))
    else:
        found = list(pairs.transitions)
        if not found:
            raise UserError("pairs.transitions: empty; expected 'all' or a list of [source, target] pairs")
    if pairs.identity:
        used = {label for pair in found for label in pair}
        found += [(label, label) for label in classes if label in used and (label, label) not in found]
    return found

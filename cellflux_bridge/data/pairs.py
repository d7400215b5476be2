"""Batches of coupled (source, target) patches, each a function of (seed, step, rank) alone."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import permutations, product
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.config import Config, registry
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.settings import DataConfig, PairsConfig
from cellflux_bridge.images import stain

# Rows of a batch that share one group, or one level, so that the coupling has a choice.
_ROWS_PER_DRAW = 8
# Rows that are coupled at once, at most: an exact assignment takes time that grows with their cube (1,024: 0.07 s).
_ROWS_PER_BLOCK = 1024
# Pools whose rows are remembered: more than the batches that are made at once belong to.
_NUM_POOLS = 32


class PairBatch(NamedTuple):
    """x0, x1 (B, 3, S, S) uint8; class numbers (B,) int64; the targets' soft labels (B, num_classes) float32, one-hot
    by class; the patches' numbers in the data set, (B,) int64; the targets' batches (B,) int64, -1 for none, and doses
    (B,) float32, 0 for none; and each pair's stain jitter (B, 4, 3), if any."""

    x0: torch.Tensor
    x1: torch.Tensor
    source_class: torch.Tensor
    target_class: torch.Tensor
    target_level: torch.Tensor
    source_index: torch.Tensor
    target_index: torch.Tensor
    batch: torch.Tensor
    dose: torch.Tensor
    jitter: torch.Tensor | None = None

    def patches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources and targets (B, 3, S, S) float32 in [-1, 1], their stain jittered, on the device of this batch."""
        x0, x1 = images.encode(self.x0), images.encode(self.x1)
        return (x0, x1) if self.jitter is None else stain.jitter(torch.stack([x0, x1], dim=1), self.jitter).unbind(1)


class _Rows(NamedTuple):
    """Rows before or after they are coupled: numbers (n,) of the patches that are sources and targets; which sources
    are their own targets, at the level of the target that they replace; kinds and groups; where both are cut (n, 3)."""

    source: np.ndarray
    target: np.ndarray
    stays: np.ndarray
    kind: np.ndarray
    group: np.ndarray
    source_place: np.ndarray
    target_place: np.ndarray


class Pairs:
    """Draws what is to become what first, evenly, then patches, then couples them among rows of the same kind.

    The rows of `pairs.pool` consecutive batches are coupled together: each batch keeps its sources, and which target
    each of them gets is chosen among all targets of its kind in the pool, up to 1,024. The more there are, the more a
    target resembles its source, and the less a network can do better than to leave the source.

    By class: (source class, target class) as `pairs.transitions` names them. By level, with `levels` (N, num_classes),
    the patches' soft labels: any source class that a transition names, to any level, independently; targets of a kind
    have nearly the same level (`level_bins` steps between two classes), so that nothing is paired across levels, and a
    level that few patches have is drawn more often than they are frequent, by the square root. Of the sources whose own
    level is that of their kind's targets, the share `pairs.self_pairs` are their own targets: to become what one is
    already is to stay. Their target level is that of the target that they replace, so that a network cannot learn to
    stay at exactly its source's level only, and to draw the source anew beside it.

    No other source gets a crop of itself as target. Where its block has no other target for it (in a block of one row,
    or in a group of one patch), it becomes a self pair: the same crop, at its own level.

    `coupling` is a `coupling.base.Coupling`; None does to find out whether there are pairs. Raises UserError for a
    transition between unknown classes, and where a class, or a group that is to be matched, has too few patches.
    """

    def __init__(
        self,
        patches: Patches,
        coupling,
        *,
        split: str,
        batch_size: int,
        seed: int,
        pairs: PairsConfig,
        data: DataConfig,
        levels: np.ndarray | None = None,
        level_bins: int = 4,
        key: str = "train.batch_size",
    ):
        self._patches, self._coupling, self._split, self._by_level = patches, coupling, split, levels is not None
        self._batch_size, self._seed, self._config, self._data, self._key = batch_size, seed, pairs, data, key
        self._levels = np.eye(len(patches.classes), dtype=np.float32)[patches.labels] if levels is None else levels
        self.unmatched: dict[str, int] = {}
        named = named_transitions(patches.classes, pairs, unseen=data.split.unseen)
        self.transitions = [tuple(map(patches.class_index, pair)) for pair in named]
        members = self._members(rows=-(-batch_size // len(self.transitions)))
        # Of each kind of pair the patches that are its sources and targets, and how often it is drawn by level.
        if self._by_level:
            sources = [members[c] for c in dict.fromkeys(source for source, _ in self.transitions)]
            pool = np.concatenate(list(members.values()))
            # The bin of a patch: its level of each class rounded to 1 / level_bins; numbered as they occur.
            bins = np.unique(np.rint(self._levels[pool] * level_bins), axis=0, return_inverse=True)[1].ravel()
            targets = [pool[bins == number] for number in range(bins.max() + 1)]
            self._bin_of = np.full(len(patches.labels), -1)
            self._bin_of[pool] = bins
            self._kinds = [(source, target, len(target) ** 0.5) for source in sources for target in targets]
        else:
            self._kinds = [(members[source], members[target], 1.0) for source, target in self.transitions]
        self._groups = self._shared_groups() if pairs.match_group or pairs.match_batch else None
        self._coupled_pools: dict[tuple[int, int], Future[list[_Rows]]] = {}
        self._lock, self._background = Lock(), ThreadPoolExecutor(1)

    def _members(self, *, rows: int) -> dict[int, np.ndarray]:
        """The patches of every class that a transition names; `rows` of one class are drawn at once."""
        members = {}
        for number in sorted({c for pair in self.transitions for c in pair}):
            label = self._patches.classes[number]
            members[number] = self._patches.indices(self._split, label)
            have = len(members[number])
            if have == 0:
                raise UserError(
                    f"class {label!r} has no patch in the {self._split} split; see `cellflux-bridge data check`"
                )
            if self._split == "train" and have < rows:
                raise UserError(
                    f"{self._key}={self._batch_size} draws {rows} patches of class {label!r} at once, but the "
                    f"training split has {have}: lower {self._key} to at most {have * len(self.transitions)}, or "
                    "add patches"
                )
        return members

    def _shared_groups(self) -> list[tuple[list[tuple[np.ndarray, np.ndarray]], torch.Tensor]]:
        """For each kind, the (sources, targets) of every group, or batch, that holds both, and how often each is drawn.

        Counts in `unmatched` the patches that could only be targets, by the name of their batch.
        """
        by_batch, shared, kept = self._config.match_batch, [], []
        groups = self._patches.batches if by_batch else self._patches.groups
        key, what, names = "match_group", "group", "groups (slide, plate, batch)"
        if by_batch:
            key, what, names = "match_batch", "batch", "batches"
        refusal = f"pairs.{key}: no {what} of the {self._split} split holds "
        remedy = f"; name {names} in the manifest or set pairs.{key}=false"
        lacking: dict[int, set[int]] = {}
        # Of few held-out cells some match none.
        may_lack = self._split != "train" or self._config.batch_without_source == "leave_out"
        by_group: dict[
            int, dict[int, np.ndarray]
        ] = {}  # of an array once: a thousand perturbations share their controls
        for kind in self._kinds:
            for members in kind[:2]:
                if id(members) not in by_group:
                    by_group[id(members)] = _by_group(members[groups[members] >= 0], groups)
            sources, targets = (by_group[id(members)] for members in kind[:2])
            for number in targets.keys() - sources.keys():
                lacking.setdefault(number, set()).update(targets[number].tolist())
            if both := [(sources[g], targets[g]) for g in sources if g in targets]:
                shared.append((both, torch.tensor([float(min(len(a), len(b))) for a, b in both])))
                kept.append(kind)
            elif not self._by_level and not (by_batch and may_lack):
                both = " and ".join(repr(self._patches.classes[self._patches.labels[m[0]]]) for m in kind[:2])
                raise UserError(f"{refusal}both {both}{remedy}")
        # By level a source is a target, too: where it is alone in its group, it could only become itself.
        if not any(len(a) > 1 or len(b) > 1 or a[0] != b[0] for both, _ in shared for a, b in both):
            raise UserError(f"{refusal}a source and another patch as target{remedy}")
        if by_batch:
            self.unmatched = {self._patches.batch_names[n]: len(found) for n, found in sorted(lacking.items())}
            if self.unmatched and not may_lack:
                counts = abbreviate([f"{name} ({num} targets)" for name, num in self.unmatched.items()])
                raise UserError(
                    f"pairs.match_batch: {len(self.unmatched)} batches of the {self._split} split have targets and no "
                    f"source: {counts}; add sources (controls), or set pairs.batch_without_source=leave_out"
                )
        self._kinds = kept
        return shared

    def batch(self, step: int, *, rank: int = 0) -> PairBatch:
        """The batch of a step: random crops, symmetries and stain jitter in training, middle crops elsewhere.

        Threads may ask for several at once. A pool's pairs are chosen in the background, in training those of the next
        pool, too, while batches of this one are made.
        """
        number, place = divmod(step, self._config.pool)
        with self._lock:
            for upcoming in (number, number + 1) if self._split == "train" else (number,):
                if (upcoming, rank) not in self._coupled_pools:
                    self._coupled_pools[upcoming, rank] = self._background.submit(self._coupled, upcoming, rank)
            pool = self._coupled_pools[number, rank]
            for oldest in list(self._coupled_pools)[:-_NUM_POOLS]:
                del self._coupled_pools[oldest]
        rows = pool.result()[place]
        shown = np.where(rows.stays, rows.source, rows.target)
        target_place = np.where((rows.source == shown)[:, None], rows.source_place, rows.target_place)
        x0, x1 = self._patches.cut(rows.source, rows.source_place), self._patches.cut(shown, target_place)
        how, generator = self._data.stain, torch_generator(self._seed, "stain", step, rank)
        is_jittered = self._split == "train" and how.mode == "augment"
        jitter = stain.draw_jitter(len(x0), strength=how.strength, generator=generator) if is_jittered else None
        columns = (self._patches.labels[rows.source], self._patches.labels[shown], self._levels[rows.target])
        columns += (rows.source, shown, self._patches.batches[shown], self._patches.doses[shown])
        return PairBatch(x0, x1, *map(torch.from_numpy, columns), jitter)

    def _coupled(self, number: int, rank: int) -> list[_Rows]:
        """The batches of a pool, each with the targets that the coupling gave to its sources."""
        num = self._config.pool
        drawn = [self._drawn(step, rank) for step in range(number * num, (number + 1) * num)]
        rows = _Rows(*map(np.concatenate, zip(*drawn, strict=True)))
        moves = np.flatnonzero(~rows.stays)
        if len(moves):
            moving = _Rows(*(part[moves] for part in rows))
            pairs = self._coupling.pair(
                self._features(moving.source, moving.source_place),
                self._features(moving.target, moving.target_place),
                blocks=torch.from_numpy(_numbered_blocks(moving.kind, moving.group)),
                generator=torch_generator(self._seed, "coupling", self._split, number, rank),
                patches=(torch.from_numpy(moving.source), torch.from_numpy(moving.target)),
            )
            i, j = (side.numpy() for side in pairs)
            rows.target[moves[i]], rows.target_place[moves[i]] = moving.target[j], moving.target_place[j]
        return [_Rows(*of) for of in zip(*(np.split(part, num) for part in rows), strict=True)]

    def _features(self, indices: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """What the coupling sees of patches, of which a batch at a time is in memory: a pool of large ones takes GB."""
        starts = range(0, len(indices), self._batch_size)
        parts = ((indices[i : i + self._batch_size], places[i : i + self._batch_size]) for i in starts)
        return torch.cat([self._coupling.features(images.encode(self._patches.cut(*part))) for part in parts])

    def _drawn(self, step: int, rank: int) -> _Rows:
        """The rows of a batch before they are coupled."""
        generator = torch_generator(self._seed, "pairs", self._split, step, rank)
        indices, num, flips = self._draw_indices(generator), self._batch_size, self._data.flips
        if self._split == "train":
            places = [self._patches.random_places(num, flips=flips, generator=generator) for _ in range(2)]
        else:
            places = [self._patches.middle_places(num)] * 2
        return _Rows(*indices, *places)

    def _draw_indices(self, generator: torch.Generator) -> tuple[np.ndarray, ...]:
        """Of each row of a batch: source, target, whether the source stays, kind and group (0 if unmatched)."""
        if self._by_level:
            weights = torch.tensor([weight for _, _, weight in self._kinds])
            num = -(-self._batch_size // _ROWS_PER_DRAW)
            order = torch.multinomial(weights, num, replacement=True, generator=generator).tolist()
        else:
            order = torch.randperm(len(self._kinds), generator=generator).tolist()
            if self._config.match_batch:  # of many perturbations a few, so that each row has others to choose from
                order = order[: -(-self._batch_size // _ROWS_PER_DRAW)]
        shares = np.array_split(np.arange(self._batch_size), len(order))
        rows = []
        for kind, share in zip(order, shares, strict=True):
            # A batch smaller than the number of transitions leaves some of them out.
            for group, sources, targets, num in self._pools(kind, len(share), generator) if len(share) else ():
                source, target = _draw(sources, num, generator), _draw(targets, num, generator)
                stays = np.zeros(num, bool)
                if self._by_level and self._config.self_pairs:
                    stays = torch.rand(num, generator=generator).numpy() < self._config.self_pairs
                    stays &= self._bin_of[source] == self._bin_of[target]
                rows.append((source, target, stays, np.full(num, kind), np.full(num, group)))
        return tuple(np.concatenate(column) for column in zip(*rows, strict=True))

    def _pools(self, kind: int, num: int, generator: torch.Generator):
        """(group, sources, targets, how many to draw), several where groups are matched."""
        if self._groups is None:
            return [(0, *self._kinds[kind][:2], num)]
        shared, weights = self._groups[kind]
        sizes = [len(part) for part in np.array_split(np.arange(num), -(-num // _ROWS_PER_DRAW))]
        chosen = torch.multinomial(weights, len(sizes), replacement=True, generator=generator).tolist()
        return [(group, *shared[group], size) for group, size in zip(chosen, sizes, strict=True)]


def build_pairs(
    config: Config,
    patches: Patches,
    *,
    split: str,
    batch_size: int,
    seed: int,
    levels: np.ndarray | None,
    key: str = "train.batch_size",
) -> Pairs:
    """The pairs of a resolved configuration, coupled as it says; `key` gave the batch size, for messages."""
    options = {"pairs": config.pairs, "data": config.data, "level_bins": config.condition.level_bins, "key": key}
    coupling = registry.build("coupling", config.coupling)
    return Pairs(patches, coupling, split=split, batch_size=batch_size, seed=seed, levels=levels, **options)


def _by_group(members: np.ndarray, groups: np.ndarray) -> dict[int, np.ndarray]:
    """The members of each group, in their order; groups ascend."""
    order = members[np.argsort(groups[members], kind="stable")]
    names, starts = np.unique(groups[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, starts[1:]) if len(order) else [], strict=True))


def _numbered_blocks(kind: np.ndarray, group: np.ndarray) -> np.ndarray:
    """One number for all rows of the same kind and group, in parts of at most _ROWS_PER_BLOCK."""
    same = np.unique(np.stack([kind, group]), axis=1, return_inverse=True)[1].ravel()
    blocks = np.zeros(len(same), np.int64)
    for number in range(same.max() + 1):
        rows = np.flatnonzero(same == number)
        blocks[rows] = blocks.max() + 1 + np.arange(len(rows)) // _ROWS_PER_BLOCK
    return blocks


def _draw(pool: np.ndarray, num: int, generator: torch.Generator) -> np.ndarray:
    """`num` of a pool, each once where the pool is large enough."""
    while num**2 <= len(pool):  # collisions are rare, and a permutation of millions is slow
        drawn = torch.randint(len(pool), (num,), generator=generator)
        if len(drawn.unique()) == num:
            return pool[drawn.numpy()]
    if num <= len(pool):
        return pool[torch.randperm(len(pool), generator=generator)[:num].numpy()]
    return pool[torch.randint(len(pool), (num,), generator=generator).numpy()]


def named_transitions(
    classes: Sequence[str], pairs: PairsConfig, *, unseen: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """The (source, target) classes that a network is trained on, identity pairs at the end; `unseen` ones are left out
    where "*" or "all" names them."""
    if pairs.transitions == "all":
        found = [(a, b) for a, b in permutations(classes, 2) if not {a, b} & set(unseen)]
    else:
        seen = [label for label in classes if label not in unseen]
        found = [
            (a, b)
            for pair in pairs.transitions
            for a, b in product(*(seen if label == "*" else [label] for label in pair))
            if a != b or "*" not in pair
        ]
    if not found:
        raise UserError("pairs.transitions: empty; expected 'all' or a list of [source, target] pairs")
    if pairs.identity:
        used = {label for pair in found for label in pair}
        found += [(label, label) for label in classes if label in used and (label, label) not in found]
    return found


def left_out(unmatched: Mapping[str, int]) -> str:
    """What is said of training cells whose batch has no source."""
    shown = abbreviate([f"{name} ({num})" for name, num in unmatched.items()])
    return f"left out of training: {sum(unmatched.values())} targets whose batch has no source: {shown}"

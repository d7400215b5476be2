"""Which patches train, validate and test: groups go whole."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.seeds import derive_seed, numpy_generator
from cellflux_bridge.data.layout.base import PatchRecord

# Shares as near to the asked ones as this are left as they are, so that a new group moves few others.
_NEAR = 0.005
# Shares further from the asked ones than this are told.
_FAR = 0.05
# What moving a group must gain, as a sum of squared deviations over splits and classes.
_LEAST_GAIN = 1e-5
# Exchanges of two groups are tried among at most so many: their number grows with the square.
_NUM_TO_EXCHANGE = 400
_NUM_STARTS = 8


def check_groups(records: Sequence[PatchRecord], *, origin: str) -> None:
    """UserError that lists groups which stand in more than one split: scores on such splits would be leaked."""
    splits = defaultdict(set)
    for group, split in {(r.group, r.split) for r in records if r.group is not None and r.split is not None}:
        splits[group].add(split)
    if leaks := [f"{g} ({'+'.join(sorted(found))})" for g, found in sorted(splits.items()) if len(found) > 1]:
        raise UserError(
            f"{origin}: {len(leaks)} groups stand in more than one split: {abbreviate(leaks)}; "
            "a patient, slide or tile must stay in one split"
        )


def assign_splits(records: Sequence[PatchRecord], *, val: float, test: float, seed: int) -> list[PatchRecord]:
    """Records in which every one has a split, missing splits being taken from what is not yet given away.

    A record that names no split follows the rest of its group. A `val` or `test` that the data names is left as it is;
    one that it does not name is taken from the records that would train, also where the data names those `train`,
    unless its fraction is 0. Groups go whole and come first (see `_of_groups`). Then, class by class, patches without a
    group fill `test` and `val` up to the asked fraction of all patches of their class, in an order that the seed and
    each one's id decide, so that a new patch moves no more than its neighbours. The rest trains: every class keeps
    something to train on and, where it has three groups or patches, something of each split.
    """
    of_group = {r.group: r.split for r in records if r.group is not None and r.split is not None}
    open_ = [r.split or of_group.get(r.group) for r in records]
    given = set(open_)
    wanted = {name: part for name, part in (("test", test), ("val", val)) if name not in given and part > 0}
    pool = [i for i, split in enumerate(open_) if split in (None, "train")] if wanted else []
    totals = Counter(records[i].label for i in pool)
    groups: dict[str, list[int]] = defaultdict(list)
    alone: dict[str, list[int]] = defaultdict(list)
    for i in pool:
        (alone[records[i].label] if records[i].group is None else groups[records[i].group]).append(i)
    for name, split in _of_groups(records, groups, wanted, alone=alone, seed=seed).items():
        for i in groups[name]:
            open_[i] = split
    taken = Counter((records[i].label, open_[i]) for members in groups.values() for i in members)
    for label, members in alone.items():
        members.sort(key=lambda i: (derive_seed(seed, "split", f"\0{records[i].id}"), records[i].id), reverse=True)
        empty = sum(taken[label, split] == 0 for split in ("train", *wanted))
        for name, part in wanted.items():
            empty -= taken[label, name] == 0
            # The last ones stay for training and for the splits that have nothing yet.
            while taken[label, name] < part * totals[label] and len(members) > empty:
                open_[members.pop()] = name
                taken[label, name] += 1
    splits = [split or "train" for split in open_]
    return [r if r.split == split else replace(r, split=split) for r, split in zip(records, splits, strict=True)]


def describe_shares(records: Sequence[PatchRecord], *, given: set[str | None], val: float, test: float) -> list[str]:
    """How near assigned splits came to the asked ones, with a warning for each class further away than `_FAR`.

    `given` are the splits that the data itself names; they are left as they are and not described.
    """
    wanted = {name: part for name, part in (("val", val), ("test", test)) if name not in given and part > 0}
    shares, warnings = {name: [] for name in wanted}, []
    for label in sorted({record.label for record in records}):
        pool = [r for r in records if r.label == label and r.split in ("train", *wanted)]
        parts = Counter(f"\0{r.id}" if r.group is None else r.group for r in pool)
        for name, asked in wanted.items() if pool else ():
            got = sum(record.split == name for record in pool) / len(pool)
            shares[name].append(f"{got:.0%} of {label}")
            if abs(got - asked) > _FAR + 1e-9:
                warnings.append(
                    f"WARNING: class {label!r} has {got:.0%} of its patches in {name}, asked were {asked:.0%}: groups "
                    f"go whole, it has {len(parts)}, and the largest holds {max(parts.values()) / len(pool):.0%}"
                )
    return [f"split {name}: asked {wanted[name]:.0%}, got {', '.join(got)}" for name, got in shares.items()] + warnings


def _of_groups(
    records: Sequence[PatchRecord],
    groups: dict[str, list[int]],
    wanted: dict[str, float],
    *,
    alone: dict[str, list[int]],
    seed: int,
) -> dict[str, str]:
    """The split of every group, so that each class's shares come near to the wanted ones.

    In an order that the seed and their names decide, groups fill the wanted splits one after the other, the rest
    trains. Then groups are moved and exchanged, each time the one or two that gain most, until the sum of squared
    deviations of all shares of all classes falls no more. Where shares are still not near, this is done from other
    orders, too, and the best result is taken. A class that lacks a split outweighs any deviation.
    """
    names = sorted(groups, key=lambda name: (derive_seed(seed, "split", name), name))
    if not names:
        return {}
    of_group = [Counter(records[i].label for i in groups[name]) for name in names]
    labels = sorted(set().union(*of_group))
    counts = np.array([[count[label] for label in labels] for count in of_group], float)
    splits = ("train", *wanted)
    parts = np.array([1 - sum(wanted.values()), *wanted.values()])
    lacking = np.outer([100 if split == "train" else 10 for split in splits], [len(alone[c]) < 3 for c in labels])
    best, least = None, np.inf
    for start in range(_NUM_STARTS if len(names) <= _NUM_TO_EXCHANGE else 1):
        order = numpy_generator(seed, "split", start).permutation(len(names)) if start else np.arange(len(names))
        place = np.zeros(len(names), int)
        reached = (counts.sum(1)[order].cumsum() - counts.sum(1)[order] / 2) / counts.sum()
        place[order] = (np.searchsorted(parts[1:].cumsum(), reached) + 1) % len(parts)
        cost, far = _improve(place, counts, parts, lacking)
        if cost < least - _LEAST_GAIN:
            best, least = place, cost
        if far <= _NEAR:
            break
    return {name: splits[number] for name, number in zip(names, best.tolist(), strict=True)}


def _improve(place: np.ndarray, counts: np.ndarray, parts: np.ndarray, lacking: np.ndarray) -> tuple[float, float]:
    """Moves and exchanges groups, changing `place` (G,), while that gains; the cost reached and the largest deviation.

    `counts` (G, classes), `parts` (S,), and `lacking` (S, classes), the cost of a class that a split lacks.
    """
    totals = counts.sum(0)

    def cost(split, sums: np.ndarray) -> np.ndarray:
        return ((sums / totals - parts[split, None]) ** 2 + lacking[split] * (sums == 0)).sum(-1)

    each, every = np.arange(len(counts)), np.arange(len(parts))
    while True:
        sums = np.stack([counts[place == split].sum(0) for split in every])
        now, far = cost(every, sums), np.abs(sums / totals - parts[:, None]).max()
        if far <= _NEAR and not (lacking * (sums == 0)).any():
            break
        moved = np.stack([cost(split, sums[split] + counts) - now[split] for split in every], axis=1)
        moved += (cost(place, sums[place] - counts) - now[place])[:, None]
        moved[each, place] = 0
        group, split = np.unravel_index(moved.argmin(), moved.shape)
        if moved[group, split] < -_LEAST_GAIN:
            place[group] = split
            continue
        gain, exchange = -_LEAST_GAIN, None
        for a, b in combinations(every, 2) if len(counts) <= _NUM_TO_EXCHANGE else ():
            of_a, of_b = np.flatnonzero(place == a), np.flatnonzero(place == b)
            if len(of_a) and len(of_b):
                change = counts[of_b] - counts[of_a][:, None]
                swapped = cost(a, sums[a] + change) + cost(b, sums[b] - change) - now[a] - now[b]
                i, j = np.unravel_index(swapped.argmin(), swapped.shape)
                if swapped[i, j] < gain:
                    gain, exchange = swapped[i, j], (of_a[i], of_b[j])
        if exchange is None:
            break
        place[list(exchange)] = place[list(exchange)[::-1]]
    return float(now.sum()), float(far)

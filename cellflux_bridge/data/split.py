"""Which patches train, validate and test: groups go whole."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from cellflux_bridge.base.errors import UserError, abbreviate
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.data.layout.base import PatchRecord


def check_groups(records: Sequence[PatchRecord], *, origin: str) -> None:
    """UserError that lists groups which stand in more than one split: scores on such splits would be leaked."""
    splits = defaultdict(set)
    for record in records:
        if record.group is not None and record.split is not None:
            splits[record.group].add(record.split)
    leaks = [f"{group} ({'+'.join(sorted(found))})" for group, found in sorted(splits.items()) if len(found) > 1]
    if leaks:
        raise UserError(
            f"{origin}: {len(leaks)} groups stand in more than one split: {abbreviate(leaks)}; "
            "a patient, slide or tile must stay in one split"
        )


def assign_splits(records: Sequence[PatchRecord], *, val: float, test: float, seed: int) -> list[PatchRecord]:
    """Records in which every one has a split, missing splits being taken from what is not yet given away.

    Groups go whole: a record that names no split follows the rest of its group. For each class (a group's own is its
    most frequent one) groups stand in an order that the seed and each group's name decide, so that a new group moves
    no more than its neighbours, and are given to `test`, then `val`, until the wanted fraction of that class's patches
    is reached; the rest trains. A `val` or `test` that the data names is left as it is; one that it does not name is
    taken from `train` also where the data names that, unless its fraction is 0.
    """
    of_group = {r.group: r.split for r in records if r.group is not None and r.split is not None}
    records = [replace(r, split=of_group.get(r.group)) if r.split is None else r for r in records]
    given = {record.split for record in records if record.split is not None}
    wanted = {name: part for name, part in (("test", test), ("val", val)) if name not in given and part > 0}
    pool: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if record.split in (None, "train"):
            pool[record.group if record.group is not None else f"\0{record.id}"].append(index)
    by_class: dict[str, list[list[int]]] = defaultdict(list)
    for group in sorted(pool, key=lambda name: (derive_seed(seed, "split", name), name)):
        members = pool[group]
        by_class[Counter(records[i].label for i in members).most_common(1)[0][0]].append(members)
    split_of: dict[int, str] = {}
    for _, groups in sorted(by_class.items()):
        total = sum(map(len, groups))
        position = 0
        for name, part in wanted.items():
            taken = 0
            # The last group always stays for training.
            while taken < part * total and position < len(groups) - 1:
                members = groups[position]
                split_of.update(dict.fromkeys(members, name))
                taken += len(members)
                position += 1
    return [replace(r, split=split_of.get(i, r.split or "train")) for i, r in enumerate(records)]

"""What a researcher wants to know of a folder of patches before training on it."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import abbreviate
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config import Config
from cellflux_bridge.data.compression import Encoding, compare, encoding
from cellflux_bridge.data.index import Index, frame_mpp, left_out, patch_index, taken_from_training
from cellflux_bridge.data.layout.base import SPLITS, PatchRecord
from cellflux_bridge.data.near_copies import near_copies, thumbnail
from cellflux_bridge.data.pairs import Pairs
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.data.preprocessing import Preprocessing, require_no_enlargement
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.data.split import describe_shares
from cellflux_bridge.images.panels import named_rows

# The list of files that cannot be used, beside the contact sheet.
UNUSABLE = "unusable.txt"
# Classes are many where they are perturbations: so many are tabled and drawn, and so many drawn channel by channel.
_FEW, _FEWEST = 20, 6
_ACROSS = (("across splits", "split"), ("across classes", "label"))


class _Facts(NamedTuple):
    """What one decoding of a patch's file told: its size (height, width), a digest of its pixels, its thumbnail."""

    record: PatchRecord
    size: tuple[int, int]
    digest: str
    thumbnail: np.ndarray
    encoding: Encoding


def check_data(config: DataConfig, *, seed: int, sheet: Path) -> tuple[str, bool]:
    """A report in plain words, and whether training can start: how the folder was read, counts, shares, sizes,
    compression, duplicates, near copies, unreadable files.

    Every file is decoded once. Pictures are written: to `sheet`, a row a class, patches as the network will see them
    (before stain normalisation), and beside it, to `near_copies.png`, the most alike near copies, and, where images are
    not RGB or have batches, to `channels.png`, a few patches in false colour and channel by channel. Of many classes
    the largest are tabled and drawn. Ids of unreadable files go to `unusable.txt` there, for `data.without`. Duplicates
    are files whose decoded pixels are equal. Training cannot start with an unreadable file, nor where a class lacks
    training, validation or test patches (test patches may be done without by data.split.test=0).
    """
    index = patch_index(config, seed=seed)
    records, classes = index.records(), index.classes
    given = {SPLITS[number] for number in np.unique(index.named) if number < len(SPLITS)}
    preprocessing = Preprocessing.of(config)
    found = threaded(lambda r: _inspect(r, preprocessing, config), records, workers=config.workers, desc="checking")
    facts = [one for one in found if isinstance(one, _Facts)]
    unreadable = {record.id: one for record, one in zip(records, found, strict=True) if isinstance(one, str)}
    counts = Counter((record.label, record.split) for record in records)
    sizes = Counter(record.label for record in records)
    largest = {label for label, _ in sizes.most_common(_FEW)}
    few = [label for label in classes if label in largest or len(classes) <= _FEW]
    others = [label for label in classes if label not in few]
    width = max(map(len, few))
    lines = [f"{config.root}: {len(records)} patches, {len(classes)} classes"]
    lines.append("  " + " " * width + "".join(f"{split:>9}" for split in SPLITS))
    lines += [f"  {c:<{width}}" + "".join(f"{counts[c, split]:>9}" for split in SPLITS) for c in few]
    if others:
        rest = "".join(f"{sum(counts[c, split] for c in others):>9}" for split in SPLITS)
        lines.append(f"  {'others':<{width}}{rest}  ({len(others)} smaller classes)")
    lines += [*index.reading, *(() if index.batch_names else _ids_for_classes(classes, config))]
    if aside := sum(record.split is None for record in records):
        lines.append(f"left aside by data.split.train_groups: {aside} patches of other groups")
    if len(classes) == 2:
        lines.append(f"direction: level 0 = {classes[0]}, level 1 = {classes[1]}; data.classes=[...] turns it round")
    if taken := taken_from_training(index):
        lines.append(taken)
    if index.batch_names:
        batches, doses = np.bincount(index.batches + 1, minlength=1)[1:], np.unique(index.doses[index.doses > 0])
        lines.append(f"batches: {(batches > 0).sum()}, of {batches[batches > 0].min()} to {batches.max()} patches")
        lines += [f"doses: {len(doses)}, from {doses.min():.4g} to {doses.max():.4g}"] if len(doses) else []
    groups = {record.group for record in records} - {None}
    lines.append(f"groups: {len(groups) or 'none named; every patch counts as its own'}")
    shares = describe_shares(records, given=given, val=config.split.val, test=config.split.test)
    if shares and not groups:
        lines.append(
            "WARNING: patches are split one by one, because no groups are named. If a patient has several patches, "
            "some train and some test, and every figure is too good. Put them into root/<class>/<patient>/"
        )
    lines += shares
    lines += _sizes([one.size for one in facts], config, preprocessing)
    more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
    lines.append("\n  ".join([f"unusable files: {len(unreadable)}", *[*unreadable.values()][:20], *more]))
    unusable = sheet.with_name(UNUSABLE)
    if config.without is None:
        unusable.unlink(missing_ok=True)  # an older one would leave out what was mended
    if 0 < len(unreadable) < len(records) / 2:  # of most files the fault is another, such as a size
        replace_text(unusable, "\n".join([*left_out(config), *unreadable]) + "\n")
        lines.append(f"  all are listed in {unusable}; to go on without them set data.without={unusable}")
    if config.without is not None:
        lines.append(f"left out by data.without: {len(left_out(config))} patches")
    tabled = [one for one in facts if one.record.label in few]
    lines += compare([one.encoding for one in tabled], [one.record.label for one in tabled])
    lines += _duplicates(facts)
    lines += _near_copies(facts, index, sheet=sheet.with_name("near_copies.png"), read=preprocessing.read)
    if any(record.mpp is not None for record in records):
        mpp = frame_mpp([one.record for one in facts], preprocessing)
        unknown = "not known (missing for some patches, or more than 5 % apart); set --mpp where nuclei are counted"
        lines.append(f"microns per pixel at {config.image_size} px: {unknown if mpp is None else f'{mpp:.4g}'}")
    if facts:
        rows = {}
        for label in few:
            members = [one.record for one in facts if one.record.label == label]
            order = numpy_generator(seed, "contact sheet", label).permutation(len(members))[:12]
            rows[label] = [preprocessing(preprocessing.read(members[i].file), name=members[i].id) for i in order]
        scale, drawn = max(1, 96 // config.image_size), {label: row for label, row in rows.items() if row}
        colour = {label: list(map(images.to_rgb, row)) for label, row in drawn.items()}
        images.write_png(sheet, named_rows(colour, scale=scale))
        lines.append(f"contact sheet: {sheet}")
        if config.channels != 3 or index.batch_names:
            largest = sorted(drawn, key=sizes.__getitem__, reverse=True)[:_FEWEST]
            apart = {label: [tile for one in drawn[label][:2] for tile in _apart(one)] for label in largest}
            images.write_png(sheet.with_name("channels.png"), named_rows(apart, scale=scale))
            lines.append(f"false colour and each channel: {sheet.with_name('channels.png')}")
    lacking = _lacking(counts, classes, config, given=given)
    return "\n".join(lines + lacking), not unreadable and not lacking


def _apart(image: np.ndarray) -> list[np.ndarray]:
    """An image (H, W, C) uint8 in false colour, then each channel in grey."""
    return [images.to_rgb(image), *(images.to_rgb(image[..., k : k + 1]) for k in range(image.shape[-1]))]


def _ids_for_classes(classes: Sequence[str], config: DataConfig) -> list[str]:
    """A warning where classes that the configuration does not name look like patients or slides."""
    are_ids = len(classes) > 10 or (len(classes) > 3 and all(re.search(r"\d", name) for name in classes))
    warning = (
        f"WARNING: {len(classes)} classes: {abbreviate(classes)}. If these are patients or slides, data.root must be "
        f"the folder above (is it {config.root.absolute().parent}?). If they are classes, name them in data.classes"
    )
    return [warning] if are_ids and config.classes is None else []


def require_pairs(patches: Patches, config: Config, *, batch_size: int) -> dict[str, int]:
    """The targets that training leaves out, by their batch, because it has no source.

    UserError where training finds no pairs: an unknown transition, a class or a group without enough patches.
    """
    by_level = config.condition.target == "level"
    levels = np.eye(len(patches.classes), dtype=np.float32)[patches.labels] if by_level else None
    settings = {"seed": config.seed, "pairs": config.pairs, "data": config.data, "levels": levels}
    found = [Pairs(patches, None, split=split, batch_size=batch_size, **settings) for split in ("train", "val")]
    return found[0].unmatched


def _inspect(record: PatchRecord, preprocessing: Preprocessing, config: DataConfig) -> _Facts | str:
    try:
        rgb = preprocessing.read(record.file)
        preprocessing.scaled_size(*rgb.shape[:2], name=str(record.file))
        require_no_enlargement(config, preprocessing, *rgb.shape[:2], name=str(record.file))
    except ValueError as error:
        return str(error)
    digest = hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()
    return _Facts(record, rgb.shape[:2], digest, thumbnail(images.to_rgb(rgb)), encoding(record.file))


def _lacking(counts: Counter, classes: Sequence[str], config: DataConfig, *, given: set[str]) -> list[str]:
    """Which classes lack patches of which split, so that they cannot be trained or judged."""
    lines = []
    for split in SPLITS:
        seen = [label for label in classes if split == "test" or label not in config.split.unseen]
        without = [repr(label) for label in seen if not counts[label, split]]
        if without and (split != "test" or "test" in given or config.split.test):
            how = f"name a {split} split for it" if split in given else f"raise data.split.{split}"
            way = "add patches or groups of it" if split == "train" else f"add patches or groups of it, or {how}"
            lines.append(f"PROBLEM: no patch of class {abbreviate(without)} in the {split} split: {way}")
    return lines


def _sizes(sizes: Sequence[tuple[int, int]], config: DataConfig, preprocessing: Preprocessing) -> list[str]:
    shown = [f"{w} x {h} ({n})" for (h, w), n in Counter(sizes).most_common()]
    seen = f"{config.crop} px of a file" if config.crop else "a file's shorter side"
    lines = [f"sizes: {abbreviate(shown)}; one patch shows {seen} at {config.image_size} px"]
    if sizes:
        scaled = [preprocessing.scaled_size(*size, name="") for size in sizes]
        (height, width), (usual_height, usual_width) = np.min(scaled, axis=0), np.median(scaled, axis=0)
        lines.append(f"in the cache: every image is cut to {width} x {height} px, the smallest at the network's scale")
        if 1.25 * height < usual_height or 1.25 * width < usual_width:
            lines[-1] += f"; WARNING: most are {usual_width:.0f} x {usual_height:.0f}, leave the small ones out"
    return lines


def _duplicates(facts: Sequence[_Facts]) -> list[str]:
    same = defaultdict(list)
    for one in facts:
        same[one.digest].append(one.record)
    sets = [members for members in same.values() if len(members) > 1]
    lines = [f"exact duplicates: {sum(map(len, sets)) - len(sets)} patches repeat another one"]
    for title, trait in _ACROSS:
        crossing = [members for members in sets if len({getattr(record, trait) for record in members}) > 1]
        if crossing:
            examples = [" = ".join(_named(record, trait) for record in members[:2]) for members in crossing]
            lines.append(f"  {title}: {len(crossing)} sets: {abbreviate(examples, limit=3)}")
    return lines


def _near_copies(
    facts: Sequence[_Facts], index: Index, *, sheet: Path, read: Callable[[Path], np.ndarray]
) -> list[str]:
    """Pairs of different groups that are nearly one picture, across splits and across classes, the most alike drawn."""
    sheet.unlink(missing_ok=True)  # an older one would mislead
    if not facts:
        return []
    places = {name: number for number, name in enumerate(index.ids)}
    kept = [places[one.record.id] for one in facts]
    split, label, group = (column[kept] for column in (index.splits, index.labels, index.groups))
    digest = np.array([one.digest for one in facts])

    def counts(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return ((split[i] != split[j]) | (label[i] != label[j])) & (group[i] != group[j]) & (digest[i] != digest[j])

    pairs, likeness = near_copies(np.stack([one.thumbnail for one in facts]), counts=counts)
    found = [(facts[i].record, facts[j].record, alike) for (i, j), alike in zip(pairs, likeness, strict=True)]
    what = "near copies (saved again, resized, turned, mirrored)"
    if index.batch_names or np.isfinite(index.doses).any():
        what = "cells that look alike, as centred ones often do, or near copies"
    lines = [f"{what} of different groups: {len(found)} pairs"]
    for title, trait in _ACROSS:
        crossing = [(a, b, alike) for a, b, alike in found if getattr(a, trait) != getattr(b, trait)]
        if crossing:
            examples = [f"{_named(a, trait)} ~ {_named(b, trait)}, r = {alike:.2f}" for a, b, alike in crossing[:3]]
            more = " ..." if len(crossing) > 3 else ""
            lines.append(f"  {title}: {len(crossing)} pairs: {'; '.join(examples)}{more}")
    if found:
        tiles = [[images.resize(images.to_rgb(read(r.file)), 96, 96) for r in (a, b)] for a, b, _ in found[:12]]
        images.write_png(sheet, images.sheet(tiles))
        lines.append(f"  give copies one group in a manifest.csv, or remove them; the most alike are drawn in {sheet}")
    return lines


def _named(record: PatchRecord, trait: str) -> str:
    return f"{record.id} ({getattr(record, trait)})"

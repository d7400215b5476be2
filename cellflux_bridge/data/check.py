"""What a researcher wants to know of a folder of patches before training on it."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.base.errors import abbreviate
from cellflux_bridge.base.parallel import threaded
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.data.index import frame_mpp, list_records, taken_from_training
from cellflux_bridge.data.layout.base import SPLITS, PatchRecord
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.data.settings import DataConfig


def check_data(config: DataConfig, *, seed: int, sheet: Path) -> tuple[str, bool]:
    """A report in plain words, and whether training can start: counts, sizes, duplicates, unreadable files.

    Every file is decoded. A contact sheet, a row a class, of patches as the network will see them (before stain
    normalisation) is written to `sheet`. Duplicates are files whose decoded pixels are equal.
    """
    records, classes = list_records(config, seed=seed)
    preprocessing = Preprocessing(config.image_size, config.crop)
    facts = threaded(lambda r: _inspect(r, preprocessing), records, workers=config.workers, desc="checking")
    lines = [f"{config.root}: {len(records)} patches, {len(classes)} classes"]
    counts = Counter((record.label, record.split) for record in records)
    width = max(map(len, classes))
    lines.append("  " + " " * width + "".join(f"{split:>9}" for split in SPLITS))
    for label in classes:
        lines.append(f"  {label:<{width}}" + "".join(f"{counts[label, split]:>9}" for split in SPLITS))
    taken = taken_from_training(config, seed=seed)
    if taken:
        lines.append(taken)
    groups = {record.group for record in records if record.group is not None}
    lines.append(f"groups: {len(groups) or 'none named; every patch counts as its own'}")
    sizes = Counter(fact[1] for fact in facts if fact[0] is None)
    shown = [f"{w} x {h} ({n})" for (h, w), n in sizes.most_common()]
    seen = f"{config.crop} px of a file" if config.crop else "a file's shorter side"
    lines.append(f"sizes: {abbreviate(shown)}; one patch shows {seen} at {config.image_size} px")
    scaled = [preprocessing.scaled_size(*size, name="") for size in sizes.elements()]
    if scaled:
        (height, width), (usual_height, usual_width) = np.min(scaled, axis=0), np.median(scaled, axis=0)
        lines.append(f"in the cache: every image is cut to {width} x {height} px, the smallest at the network's scale")
        if 1.25 * height < usual_height or 1.25 * width < usual_width:
            lines[-1] += f"; WARNING: most are {usual_width:.0f} x {usual_height:.0f}, leave the small ones out"
    unreadable = [fact[0] for fact in facts if fact[0] is not None]
    more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
    lines.append("\n  ".join([f"unusable files: {len(unreadable)}", *unreadable[:20], *more]))
    lines += _duplicates(records, [fact[2] for fact in facts])
    readable = [record for record, fact in zip(records, facts, strict=True) if fact[0] is None]
    if any(record.mpp is not None for record in records):
        mpp = frame_mpp(readable, preprocessing)
        unknown = "not known (missing for some patches, or more than 5 % apart); set --mpp where nuclei are counted"
        lines.append(f"microns per pixel at {config.image_size} px: {unknown if mpp is None else f'{mpp:.4g}'}")
    if readable:
        images.write_png(sheet, _contact_sheet(readable, classes, preprocessing, seed=seed))
        lines.append(f"contact sheet: {sheet}")
    return "\n".join(lines), not unreadable


def _inspect(
    record: PatchRecord, preprocessing: Preprocessing
) -> tuple[str | None, tuple[int, int] | None, str | None]:
    try:
        rgb = images.read_rgb(record.file)
        preprocessing.scaled_size(*rgb.shape[:2], name=str(record.file))
    except ValueError as error:
        return str(error), None, None
    return None, rgb.shape[:2], hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()


def _duplicates(records: list[PatchRecord], hashes: list[str | None]) -> list[str]:
    same = defaultdict(list)
    for record, key in zip(records, hashes, strict=True):
        if key is not None:
            same[key].append(record)
    sets = [members for members in same.values() if len(members) > 1]
    lines = [f"exact duplicates: {sum(map(len, sets)) - len(sets)} patches repeat another one"]
    for title, attribute in (("across splits", "split"), ("across classes", "label")):
        crossing = [m for m in sets if len({getattr(record, attribute) for record in m}) > 1]
        if crossing:
            examples = [" = ".join(f"{record.id} ({getattr(record, attribute)})" for record in m[:2]) for m in crossing]
            lines.append(f"  {title}: {len(crossing)} sets: {abbreviate(examples, limit=3)}")
    return lines


def _contact_sheet(records: list[PatchRecord], classes: tuple[str, ...], preprocessing: Preprocessing, *, seed: int):
    rows = []
    for label in classes:
        members = [record for record in records if record.label == label]
        order = numpy_generator(seed, "contact sheet", label).permutation(len(members))[:12]
        rows.append([preprocessing(images.read_rgb(members[i].file), name=members[i].id) for i in order])
    return images.sheet([row for row in rows if row], scale=max(1, 96 // preprocessing.image_size))

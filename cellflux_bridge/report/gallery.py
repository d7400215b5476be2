"""Sequences as a page shows them: a sprite of frames each, outlines of its nuclei, and what is known of every frame."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects
from skimage.measure import approximate_polygon, find_contours

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.images import resize, to_rgb
from cellflux_bridge.report.runs import Chapter, Method
from cellflux_bridge.trajectory import load_trajectory, read_source_ids

# Of one sequence no more frames than this are shown, evenly chosen with both ends.
MAX_FRAMES = 21
# Frames are stored without loss as they are; where too few sequences would fit, as WebP of at most so many pixels.
_STORED = ((None, "PNG"), (256, "WEBP"), (128, "WEBP"), (64, "WEBP"))
_FEW = 12
# Above this many pixels a row of patches is not stored without loss.
PIXELATED = 96
# The quantities of cellularity.json that are shown for single sequences.
_COUNTED = ("area_fraction", "count")
Segment = Callable[[np.ndarray], np.ndarray | None]


@dataclass(frozen=True)
class Shown:
    """One source under one method: the shown `frames`, RGB uint8 (K, H, W, 3), and what the whole sequence cost.

    For the page's script: `sprite` is a data URI of the frames side by side; `outlines` one SVG path a frame in tenths
    of a pixel; `curves` values a frame by the key of a chart ("area_fraction", "p:<judge>"), None where not known.
    """

    source_id: str
    frames: np.ndarray
    nfe: int
    gradients: int
    sprite: str = ""
    outlines: tuple[str, ...] = ()
    curves: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def has_outlines(self) -> bool:
        return any(self.outlines)

    def for_page(self) -> dict[str, Any]:
        return {"sprite": self.sprite, "outlines": self.outlines, "curves": self.curves}

    @property
    def size(self) -> int:
        """Characters of the page."""
        return len(json.dumps(self.for_page()))


@dataclass(frozen=True)
class Gallery:
    """The sequences that a chapter shows, `shown[source key][method slot]`.

    `levels[slot]` are those of the shown frames; `total` counts the sources there were to choose from; `shrunk` is the
    stored side, px, where frames lost detail.
    """

    shown: dict[str, dict[int, Shown]]
    levels: dict[int, list[float]]
    total: int
    shrunk: int | None

    @property
    def labels(self) -> list[str]:
        """The id of every source."""
        return [next(iter(row.values())).source_id for row in self.shown.values()]

    @property
    def all(self) -> list[Shown]:
        return [one for row in self.shown.values() for one in row.values()]

    @property
    def stored(self) -> int:
        return sum(one.size for one in self.all)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encode_row(frames: Iterable[np.ndarray], side: int | None, form: str) -> str:
    """Images (H, W, 3) uint8 side by side as a data URI; `side` bounds the longer side of each."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    if side is not None and max(height, width) > side:
        scale = side / max(height, width)
        frames = [resize(frame, max(1, round(height * scale)), max(1, round(width * scale))) for frame in frames]
    buffer = io.BytesIO()
    options = {"compress_level": 9} if form == "PNG" else {"quality": 88, "method": 4}
    Image.fromarray(np.concatenate(frames, axis=1)).save(buffer, format=form, **options)
    return data_uri(f"image/{form.lower()}", buffer.getvalue())


def encode_rows(rows: Sequence[Sequence[np.ndarray]], budget: int) -> list[str]:
    """Rows of images as data URIs, in the first way of storing by which all come within `budget` characters; nothing
    where none does."""
    largest = max((max(image.shape[:2]) for row in rows for image in row), default=0)
    for side, form in _STORED[largest > PIXELATED :]:
        encoded = [encode_row(row, side, form) for row in rows]
        if sum(map(len, encoded)) <= budget:
            return encoded
    return []


def outline(labels: np.ndarray) -> str:
    """The borders of a label map's objects (H, W) as one SVG path, in tenths of a pixel."""
    path = []
    tolerance = 0.25 if max(labels.shape) <= 96 else 0.6
    for number, place in enumerate(find_objects(labels), start=1):
        if place is None:
            continue
        mask = np.pad(labels[place] == number, 1)
        corner = np.array([place[0].start, place[1].start]) - 0.5  # of a padded mask whose pixels are squares
        for contour in find_contours(mask, 0.5):
            points = np.rint(10 * (approximate_polygon(contour, tolerance) + corner)).astype(int)[:-1, ::-1]
            if len(points) > 2:
                steps = np.diff(points, axis=0)
                path.append(f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{x} {y}" for x, y in steps) + "z")
    return "".join(path)


def shown_frames(num: int) -> list[int]:
    """The numbers of those of `num` frames that are shown."""
    return np.linspace(0, num - 1, min(num, MAX_FRAMES)).round().astype(int).tolist()


def gather(chapter: Chapter, *, num: int, budget: int, segment_of: Callable[[Method], Segment]) -> Gallery | None:
    """Load, draw and outline at most `num` sources within `budget` characters of page; None where no folder is there.

    Raises UserError for frames of another size than those that were judged.
    """
    methods = {method.slot: method for method in chapter.methods if method.trajectory is not None}
    if not methods:
        return None
    ids, total = _choose_sources(methods, num)
    levels = {slot: [method.header.levels[k] for k in _shown_of(method)] for slot, method in methods.items()}
    found: dict[str, dict[int, Shown]] = {}
    for slot, method in methods.items():
        for sequence in _load(method, ids[slot], chapter.size):
            # A source is the same where id and picture are.
            key = hashlib.sha256(sequence.source_id.encode() + sequence.frames[0].tobytes()).hexdigest()[:12]
            found.setdefault(key, {})[slot] = sequence
    side, form = _storage(list(found.values()), budget)
    shown, used = {}, 0
    for key, row in progress(found.items(), desc=f"drawing {chapter.source} -> {chapter.target}", unit="source"):
        drawn = {
            slot: _draw(chapter, methods[slot], of, levels[slot], segment_of, side, form) for slot, of in row.items()
        }
        used += sum(one.size for one in drawn.values())
        if shown and used > budget:
            break
        shown[key] = drawn
    return Gallery(shown, levels, total, side if side is not None and chapter.size > side else None)


def _choose_sources(methods: dict[int, Method], num: int) -> tuple[dict[int, list[str]], int]:
    """Per method the sources to show: those of all methods where there are any, evenly over the run's order."""
    ids = {slot: read_source_ids(method.trajectory) for slot, method in methods.items()}
    common = set.intersection(*map(set, ids.values()))
    first = [i for i in ids[min(ids)] if i in common]
    pool = dict.fromkeys(ids, first) if common else ids
    num = num if common else max(1, num // len(methods))
    evenly = {slot: np.linspace(0, len(of) - 1, min(num, len(of))).round().astype(int) for slot, of in pool.items()}
    total = len(first) if common else sum(map(len, pool.values()))
    return {slot: [pool[slot][i] for i in chosen] for slot, chosen in evenly.items()}, total


def _shown_of(method: Method) -> list[int]:
    return shown_frames(len(method.header.levels))


def _load(method: Method, ids: Sequence[str], size: int) -> Iterable[Shown]:
    of = load_trajectory(method.trajectory, source_ids=set(ids))
    height, width = of.frames.shape[-2:]
    if (height, width) != (size, size):
        raise UserError(
            f"{method.trajectory}: frames of {width} x {height} px, but {method.run.file} judged frames of {size} px; "
            "run cellflux-bridge evaluate again"
        )
    place = {source_id: number for number, source_id in enumerate(of.source_ids)}
    for source_id in ids:
        index = place[source_id]
        frames = to_rgb(of.sequence(index)[_shown_of(method)])
        yield Shown(source_id, np.ascontiguousarray(frames), of.nfe[index], of.gradients[index])


def _storage(rows: list[dict[int, Shown]], budget: int) -> tuple[int | None, str]:
    """The first way of storing frames in which all sources, or a few at least, come within the budget."""
    sample = [next(iter(row.values())).frames for row in rows[:3]]
    num = min(len(rows), _FEW) * max(map(len, rows))
    fits = (way for way in _STORED if num * np.mean([len(encode_row(frames, *way)) for frames in sample]) <= budget)
    return next(fits, _STORED[-1])


def _draw(chapter, method: Method, of: Shown, levels, segment_of, side: int | None, form: str) -> Shown:
    masks = [_segmented(segment_of(method), frame) for frame in of.frames]
    outlines = tuple("" if mask is None else outline(mask) for mask in masks)
    curves = _curves(chapter, method, of.source_id, levels, masks)
    return replace(of, sprite=encode_row(of.frames, side, form), outlines=outlines, curves=curves)


def _segmented(segment: Segment, frame: np.ndarray) -> np.ndarray | None:
    try:
        return segment(frame)
    except UserError:  # a frame in which nuclei cannot be counted is shown without
        return None


def _curves(chapter, method: Method, source_id: str, levels: Sequence[float], masks) -> dict[str, list[float | None]]:
    """What is known of every shown frame. cellularity.json, which leaves out counts of nuclei that are too small, comes
    before what the outlines say."""
    known = {"area_fraction": [None if m is None else round(float((m > 0).mean()), 4) for m in masks]}
    counted, by_level = method.cellularity, {}
    own = next((s for s in counted.per_source if s.source_id == source_id), None) if counted else None
    for quantity in _COUNTED:
        if values := getattr(own, quantity, None):
            by_level[quantity] = dict(zip(counted.levels, values, strict=True))
    for judge in method.run.judges:
        found = method.run.probabilities.get((method.record.trajectory, source_id, judge))
        if found is not None:
            by_level[f"p:{chapter.called(method.run.network(judge))}"] = found
    return known | {key: [values.get(level) for level in levels] for key, values in by_level.items()}

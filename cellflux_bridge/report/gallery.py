"""Sequences as a page shows them: a sprite of frames each, outlines of its nuclei, and what is known of every frame."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects
from skimage.measure import approximate_polygon, find_contours

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.progress import progress
from cellflux_bridge.images import resize
from cellflux_bridge.report.runs import Chapter, Method
from cellflux_bridge.trajectory import Trajectory, load_trajectory, read_source_ids

# Of one sequence no more frames than this are shown, evenly chosen with both ends.
MAX_FRAMES = 21
# Frames are stored without loss as they are; where too few sequences would fit, as WebP of at most so many pixels.
_STORED = ((None, "PNG"), (256, "WEBP"), (128, "WEBP"), (64, "WEBP"))
_FEW = 12
# Above this many pixels a row of patches is not stored without loss.
PIXELATED = 96
Segment = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Shown:
    """One source under one method, as the page's script reads it.

    `sprite` is a data URI of frames side by side; `outlines` one SVG path a frame in tenths of a pixel;
    `curves` values a frame by the key of a chart ("area_fraction", "p:<judge>"), None where one is not known.
    """

    sprite: str
    outlines: list[str]
    curves: dict[str, list[float | None]]
    nfe: int
    gradients: int

    @property
    def size(self) -> int:
        return len(self.sprite) + len(json.dumps(self.outlines)) + len(json.dumps(self.curves))


@dataclass(frozen=True)
class Gallery:
    """The sequences that a chapter shows: `sources` by their key, `shown[source key][method slot]`.

    `frames[slot]` are the numbers of the shown frames and `levels[slot]` their levels; `size` the frames' (H, W);
    `total` counts the sources there were to choose from, `shrunk` tells the stored side where frames lost detail.
    """

    sources: dict[str, str]
    shown: dict[str, dict[int, Shown]]
    frames: dict[int, list[int]]
    levels: dict[int, list[float]]
    size: tuple[int, int]
    total: int
    shrunk: int | None
    has_outlines: bool
    kept: dict[tuple[str, int], np.ndarray]

    @property
    def stored(self) -> int:
        """Characters of the page."""
        return sum(one.size for row in self.shown.values() for one in row.values())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encode_row(frames: Sequence[np.ndarray], side: int | None, form: str) -> str:
    """Images (H, W, 3) uint8 side by side as a data URI; `side` bounds the longer side of each."""
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


def rgb_frames(trajectory: Trajectory, index: int, chosen: Sequence[int]) -> list[np.ndarray]:
    """Frames of a sequence as RGB (H, W, 3); of fewer than three channels the first in grey."""
    frames = trajectory.sequence(index)[list(chosen)]
    frames = frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, -1)
    return [np.ascontiguousarray(frame) for frame in frames]


def _curves(
    chapter: Chapter, method: Method, source_id: str, levels: Sequence[float], masks
) -> dict[str, list[float | None]]:
    curves = {"area_fraction": [None if m is None else round(float((m > 0).mean()), 4) for m in masks]}
    curves |= _counted(method, source_id, levels)
    for judge in method.run.judges:
        by_level = method.run.probabilities.get((method.record["trajectory"], source_id, judge))
        if by_level is not None:
            curves[f"p:{chapter.called(method.run.network(judge))}"] = [by_level.get(level) for level in levels]
    return curves


def _counted(method: Method, source_id: str, levels: Sequence[float]) -> dict[str, list[float | None]]:
    """What cellularity.json tells of this very source; it refuses quantities for which nuclei are too small."""
    counted = method.cellularity
    own = next((s for s in (counted or {}).get("per_source", []) if s["source_id"] == source_id), {})
    known = {q: dict(zip(counted["levels"], own[q], strict=True)) for q in ("area_fraction", "count") if own.get(q)}
    return {quantity: [values.get(level) for level in levels] for quantity, values in known.items()}


def _segmented(segment: Segment, frames: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    def one(frame: np.ndarray) -> np.ndarray | None:
        try:
            return segment(frame)
        except UserError:  # a frame in which nuclei cannot be counted is shown without
            return None

    return [one(frame) for frame in frames]


def _choose_sources(methods: Sequence[Method], num: int) -> tuple[dict[int, list[str]], int]:
    """Per method the sources to show: those of all methods where there are any, evenly over the run's order."""
    ids = {method.slot: read_source_ids(method.trajectory) for method in methods}
    common = set.intersection(*map(set, ids.values()))
    pool = {slot: [i for i in of if i in common] if common else list(of) for slot, of in ids.items()}
    num = num if common else max(1, num // len(methods))
    evenly = {slot: np.linspace(0, len(of) - 1, min(num, len(of))).round().astype(int) for slot, of in pool.items()}
    first = min(pool)
    if common:
        chosen = [pool[first][i] for i in evenly[first]]
        return {slot: chosen for slot in pool}, len(pool[first])
    return {slot: [pool[slot][i] for i in evenly[slot]] for slot in pool}, sum(map(len, pool.values()))


def levels_shown(levels: Sequence[float]) -> list[float]:
    """Those of a sequence's levels whose frames are shown."""
    return [levels[k] for k in _shown_frames(len(levels))]


def gather(chapter: Chapter, *, num: int, budget: int, segment_of: Callable[[Method], Segment]) -> Gallery | None:
    """Load, draw and outline at most `num` sources within `budget` characters of page; None where no folder is there.

    Raises UserError for frames of another size than those that were judged.
    """
    methods = [method for method in chapter.methods if method.trajectory is not None]
    if not methods:
        return None
    ids, total = _choose_sources(methods, num)
    trajectories = {m.slot: load_trajectory(m.trajectory, source_ids=set(ids[m.slot])) for m in methods}
    frames = {slot: _shown_frames(len(of.levels)) for slot, of in trajectories.items()}
    levels = {slot: levels_shown(of.levels) for slot, of in trajectories.items()}
    for method in methods:
        _require_size(method, trajectories[method.slot], chapter.size)
    by_key = _by_key(trajectories, ids)
    side, form = _storage(trajectories, frames, by_key, budget)
    size = (chapter.size, chapter.size)
    sources, shown, kept, used = {}, {}, {}, 0
    of_slot = {method.slot: method for method in methods}
    bar = progress(by_key.items(), desc=f"drawing {chapter.source} -> {chapter.target}", unit="source")
    for key, places in bar:
        row = {}
        for slot, index in places.items():
            of, pictures = trajectories[slot], rgb_frames(trajectories[slot], index, frames[slot])
            masks = _segmented(segment_of(of_slot[slot]), pictures)
            outlines = ["" if mask is None else outline(mask) for mask in masks]
            curves = _curves(chapter, of_slot[slot], of.source_ids[index], levels[slot], masks)
            sprite = encode_row(pictures, side, form)
            row[slot] = Shown(sprite, outlines, curves, of.nfe[index], of.gradients[index])
        used += sum(one.size for one in row.values())
        if shown and used > budget:
            break
        slot, index = next(iter(places.items()))
        sources[key], shown[key] = trajectories[slot].source_ids[index], row
        for slot, index in places.items():
            kept[key, slot] = np.stack(rgb_frames(trajectories[slot], index, frames[slot]))
    shrunk = side if side is not None and max(size) > side else None
    outlined = any(one.outlines and any(one.outlines) for row in shown.values() for one in row.values())
    return Gallery(sources, shown, frames, levels, size, total, shrunk, outlined, kept)


def _require_size(method: Method, of: Trajectory, size: int) -> None:
    height, width = of.frames.shape[-2:]
    if (height, width) != (size, size):
        raise UserError(
            f"{method.trajectory}: frames of {width} x {height} px, but {method.run.file} judged frames of {size} px; "
            "run cellflux-bridge evaluate again"
        )


def _shown_frames(num: int) -> list[int]:
    return np.linspace(0, num - 1, min(num, MAX_FRAMES)).round().astype(int).tolist()


def _by_key(trajectories: dict[int, Trajectory], ids: dict[int, list[str]]) -> dict[str, dict[int, int]]:
    """{source key: {slot: its number in the slot's trajectory}}; a source is the same where name and picture are."""
    found: dict[str, dict[int, int]] = {}
    for slot, of in trajectories.items():
        place = {source_id: number for number, source_id in enumerate(of.source_ids)}
        for source_id in ids[slot]:
            index = place[source_id]
            digest = hashlib.sha256(source_id.encode() + of.frames[0, index].tobytes())
            found.setdefault(digest.hexdigest()[:12], {})[slot] = index
    return found


def _storage(trajectories, frames, by_key, budget: int) -> tuple[int | None, str]:
    """The first way of storing frames in which all sources, or a few at least, come within the budget."""
    sample = [next(iter(places.items())) for places in list(by_key.values())[:3]]
    per_source = max(map(len, by_key.values()))
    for side, form in _STORED:
        encode = partial(encode_row, side=side, form=form)
        bytes_each = np.mean([len(encode(rgb_frames(trajectories[s], i, frames[s]))) for s, i in sample])
        if min(len(by_key), _FEW) * per_source * bytes_each <= budget:
            return side, form
    return _STORED[-1]

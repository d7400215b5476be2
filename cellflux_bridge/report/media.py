"""Pictures beside the sequences, as data URIs within what the page can hold: real patches, near copies and videos."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import SCORE_WINDOW, Patches, load_patches, near_level
from cellflux_bridge.images import to_rgb
from cellflux_bridge.images.panels import Grid
from cellflux_bridge.report.gallery import data_uri, encode_rows, shown_frames
from cellflux_bridge.report.runs import Chapter, Method, config_of
from cellflux_bridge.trajectory import load_trajectory, read_source_ids
from cellflux_bridge.video.settings import VideoConfig

# So many near copies of a run, and real patches of a level, are shown.
_PICTURED = 8


class NearCopy(NamedTuple):
    """A frame beside the training patch that it lies too near to; RGB uint8 (H, W, 3) both."""

    method: str
    level: float
    source_id: str
    training_id: str
    frame: np.ndarray
    training: np.ndarray


class Stills(NamedTuple):
    """What a chapter shows beside its sequences.

    `real` patches by the number of a level of the first method and, in `rows`, the same as data URIs; `rule` says how
    they were taken; near `copies` with the URI of frame and training patch; `warnings` what is left out, and why.
    """

    real: dict[int, list[np.ndarray]]
    rows: dict[int, str]
    rule: str
    copies: list[tuple[NearCopy, str]]
    warnings: list[str]

    @property
    def stored(self) -> int:
        return sum(map(len, self.rows.values())) + sum(len(uri) for _, uri in self.copies)


def stills(chapter: Chapter, *, budget: int) -> Stills:
    """Real patches by level and near copies in `budget` characters of page, of which the copies take half at most."""
    copies, warnings = _near_copies(chapter), []
    pairs = encode_rows([[copy.frame, copy.training] for copy in copies], budget // 2)
    missing = sum(min(len(run.near_copies), _PICTURED) for run in chapter.runs) - len(pairs)
    if missing:
        warnings.append(
            f"{missing} of the worst near-copies that evaluate listed are not pictured. Their sequences were made "
            "again or are gone, or their training patches are not in the cache, or the page has no room for them."
        )
    pictured = list(zip(copies, pairs, strict=False))
    header = next((method.header for method in chapter.methods if method.header is not None), None)
    if header is None:
        return Stills({}, {}, "", pictured, warnings)
    levels = [header.levels[k] for k in shown_frames(len(header.levels))]
    real, rule = _real_patches(chapter, levels)
    rows = dict(zip(real, encode_rows(list(real.values()), budget - sum(map(len, pairs))), strict=False))
    if not rows:
        why = "the page has no room for them" if real else rule
        warnings.append(f"Real patches are not shown beside the made ones: {why}.")
    return Stills(real, rows, rule if rows else "", pictured, warnings)


class Film(NamedTuple):
    """A method's video and the picture that stands in its place until it plays, as data URIs."""

    method: str
    video: str
    poster: str

    @property
    def stored(self) -> int:
        return len(self.video) + len(self.poster)


def films(chapters: Sequence[Chapter], *, budget: int) -> list[list[Film]]:
    """For each chapter its videos, as long as they fit."""
    found = []
    for chapter in chapters:
        found.append([])
        for method in (method for method in chapter.methods if method.video is not None):
            if method.video.stat().st_size * 4 / 3 + 100 <= budget:  # base64 takes four characters for three bytes
                film = Film(method.name, data_uri("video/mp4", method.video.read_bytes()), _poster(method))
                found[-1].append(film)
                budget -= film.stored
    return found


def _poster(method: Method) -> str:
    """The last level as a method's video shows it; where that cannot be drawn nothing, and the first one is shown."""
    settings = method.config.video if isinstance(method.config, Config) else VideoConfig()
    try:
        trajectory = load_trajectory(method.trajectory, num=settings.sequences)
        layout = settings.model_dump(include={"sequences", "columns", "tile", "caption", "show_source"})
        grid = Grid(trajectory, **layout)
    except UserError:
        return ""
    text = BytesIO()
    Image.fromarray(grid.draw(len(trajectory.levels) - 1)).save(text, "WEBP", quality=70)
    return data_uri("image/webp", text.getvalue())


def _near_copies(chapter: Chapter) -> list[NearCopy]:
    """The worst near copies that evaluate listed, without those whose sequences were made again from other sources and
    those whose training patch is not in a cache here."""
    found = []
    for run in (run for run in chapter.runs if run.near_copies):
        patches = _load(config_of(Path(run.metrics.memorisation.patches)))
        methods = {m.record.trajectory: m for m in chapter.methods if m.run is run and m.trajectory is not None}
        for copy in run.near_copies[:_PICTURED]:
            method = methods.get(copy.trajectory)
            if isinstance(patches, str) or copy.training_id not in patches.ids or method is None:
                continue
            if copy.source_id not in read_source_ids(method.trajectory):
                continue
            of = load_trajectory(method.trajectory, source_ids={copy.source_id})
            k = int(np.abs(np.array(of.levels) - copy.level).argmin())
            frame, training = to_rgb(of.sequence(0)[k]), _pictures(patches, [patches.ids.index(copy.training_id)])[0]
            if frame.shape == training.shape:
                place = (method.name, copy.level, copy.source_id, copy.training_id)
                found.append(NearCopy(*place, np.ascontiguousarray(frame), training))
    return found


def _pictures(patches: Patches, numbers: Sequence[int]) -> list[np.ndarray]:
    """The middle patches of these numbers as RGB (H, W, 3)."""
    return [np.ascontiguousarray(to_rgb(image)) for image in patches.centre(numbers).permute(0, 2, 3, 1).numpy()]


def _load(config: Config | str | None) -> Patches | str:
    """The patches from the cache that the training left, or why they cannot be had."""
    if not isinstance(config, Config):
        return config or "the configuration of its data is not here"
    if not config.data.root.expanduser().exists():
        return f"the data folder {config.data.root} is not here (relative paths count from where the command runs)"
    try:
        return load_patches(config.data, seed=config.seed, build=False)
    except UserError as error:
        return str(error)


def _real_patches(chapter: Chapter, levels: Sequence[float]) -> tuple[dict[int, list[np.ndarray]], str]:
    """Some real test patches (H, W, 3) for each level's number, and the rule by which they were taken.

    They are of every level where the data has scores, else of the two ends. They come from the cache that the training
    left. Without it the dictionary is empty and the text says why.
    """
    # The severity estimator comes first, because its patches have scores of the whole range.
    networks = (network for run in chapter.runs for network in run.metrics.networks)
    configs = [config_of(Path(network.checkpoint)) for network in networks if network.use == "scores"]
    why = "the configuration of its data is not here"
    for config in (*configs, *(method.config for method in chapter.methods)):
        if isinstance(config, Config) and config.data.image_size != chapter.size:
            why = f"the data of its networks have {config.data.image_size} px"
        elif config is not None and isinstance(patches := _load(config), str):
            why = patches
        elif config is not None and {chapter.source, chapter.target} <= set(patches.classes):
            return _by_level(chapter, patches, levels)
    return {}, why


def _by_level(chapter, patches, levels) -> tuple[dict[int, list[np.ndarray]], str]:
    test = patches.indices("test")
    scores = patches.scores_towards(chapter.target, test)
    draw, found = numpy_generator(0, "report", "real"), {}
    scored = bool(len(test)) and bool(np.isfinite(scores).any())
    ends = {0.0: chapter.source, 1.0: chapter.target}
    for k, level in enumerate(levels):
        if scored:
            chosen = test[near_level(scores, level)]
        else:
            chosen = patches.indices("test", ends[level]) if level in ends else test[:0]
        if len(chosen):
            found[k] = _pictures(patches, draw.permutation(chosen)[:_PICTURED])
    rule = (
        f"with a score within {SCORE_WINDOW} of the level"
        if scored
        else "of the two classes, since the data has no scores"
    )
    return found, f"random patches of the test split, {rule}"

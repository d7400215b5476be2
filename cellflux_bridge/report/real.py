"""Real patches beside made ones: of every level where the data has scores, else of the two ends; and near copies."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.data.patches import SCORE_WINDOW, Patches, load_patches, near_level
from cellflux_bridge.report.gallery import rgb_frames
from cellflux_bridge.report.runs import Chapter
from cellflux_bridge.trajectory import load_trajectory, read_source_ids


def _configs(chapter: Chapter) -> list[Config]:
    """Of the severity estimator, whose patches have scores of the whole range, then of the methods."""
    estimators = [n["checkpoint"] for run in chapter.runs for n in run.metrics["networks"] if n["use"] == "scores"]
    files = [Path(checkpoint) / "config.yaml" for checkpoint in estimators]
    found = [load_config(file) for file in files if file.exists()]
    return found + [method.config for method in chapter.methods if method.config is not None]


class NearCopy(NamedTuple):
    """A frame beside the training patch that it lies too near to; RGB uint8 (H, W, 3) both."""

    method: str
    level: float
    source_id: str
    training_id: str
    frame: np.ndarray
    training: np.ndarray


def near_copies(chapter: Chapter, *, num: int = 8) -> list[NearCopy]:
    """The worst near copies that evaluate listed, as far as their frames and the training patches are here: neither
    are where the sequences were made anew of other sources, or the data is elsewhere."""
    found = []
    for run in chapter.runs:
        memory = run.metrics.get("memorisation") or {"near_copies": []}
        listed = memory["near_copies"][:num]
        patches = _cached(Path(memory["patches"]) / "config.yaml") if listed else None
        methods = {method.record["trajectory"]: method for method in chapter.methods if method.run is run}
        for copy in listed:
            method = methods.get(copy["trajectory"])
            if patches is None or copy["training_id"] not in patches.ids or method is None or method.trajectory is None:
                continue
            if copy["source_id"] not in read_source_ids(method.trajectory):
                continue
            of = load_trajectory(method.trajectory, source_ids={copy["source_id"]})
            k = min(range(len(of.levels)), key=lambda k, of=of, copy=copy: abs(of.levels[k] - copy["level"]))
            training = patches.centre([patches.ids.index(copy["training_id"])])[0].permute(1, 2, 0).numpy()
            frame = rgb_frames(of, 0, [k])[0]
            if frame.shape != training.shape:
                continue
            place = (method.name, copy["level"], copy["source_id"], copy["training_id"])
            found.append(NearCopy(*place, frame, np.ascontiguousarray(training)))
    return found


def _cached(file: Path) -> Patches | None:
    """The patches of a configuration, where data and cache are here."""
    if not file.exists():
        return None
    config = load_config(file)
    patches = _load(config)
    return patches if isinstance(patches, Patches) else None


def _load(config: Config) -> Patches | str:
    """The patches from the cache that the training left, or why they cannot be had."""
    if not config.data.root.expanduser().exists():
        return f"the data folder {config.data.root} is not here (relative paths count from where the command runs)"
    try:
        return load_patches(config.data, seed=config.seed, build=False)
    except UserError as error:
        return str(error)


def real_patches(chapter: Chapter, levels: Sequence[float], *, num: int = 8) -> tuple[dict[int, list[np.ndarray]], str]:
    """Up to `num` real test patches (H, W, 3) for each level's number, and the rule by which they were taken.

    Patches come from the cache that the training left. Without it the dictionary is empty and the text says why.
    """
    why = "the configuration of its data is not here"
    for config in _configs(chapter):
        if config.data.image_size != chapter.size:
            why = f"the data of its networks have {config.data.image_size} px"
            continue
        patches = _load(config)
        if isinstance(patches, str):
            why = patches
            continue
        if {chapter.source, chapter.target} <= set(patches.classes):
            return _by_level(chapter, patches, levels, num)
    return {}, why


def _by_level(chapter, patches, levels, num) -> tuple[dict[int, list[np.ndarray]], str]:
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
            drawn = patches.centre(draw.permutation(chosen)[:num]).permute(0, 2, 3, 1).numpy()
            found[k] = [np.ascontiguousarray(rgb) for rgb in drawn]
    rule = (
        f"score within {SCORE_WINDOW} of the level" if scored else "of the two classes; the data has no scores between"
    )
    return found, f"random patches of the test split, {rule}"

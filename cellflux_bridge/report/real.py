"""Real patches beside made ones: of every level where the data has scores, else of the two ends; and near copies."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import SCORE_WINDOW, Patches, load_patches, near_level
from cellflux_bridge.images import to_rgb
from cellflux_bridge.report.runs import Chapter, config_of
from cellflux_bridge.trajectory import load_trajectory, read_source_ids


class NearCopy(NamedTuple):
    """A frame beside the training patch that it lies too near to; RGB uint8 (H, W, 3) both."""

    method: str
    level: float
    source_id: str
    training_id: str
    frame: np.ndarray
    training: np.ndarray


def near_copies(chapter: Chapter, *, num: int = 8) -> list[NearCopy]:
    """The worst near copies that evaluate listed. Left out are those whose sequence was made anew of other sources, and
    those whose training patch is not in a cache here."""
    found = []
    for run in (run for run in chapter.runs if run.near_copies):
        patches = _load(config_of(Path(run.metrics.memorisation.patches)))
        methods = {m.record.trajectory: m for m in chapter.methods if m.run is run and m.trajectory is not None}
        for copy in run.near_copies[:num]:
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


def real_patches(chapter: Chapter, levels: Sequence[float], *, num: int = 8) -> tuple[dict[int, list[np.ndarray]], str]:
    """Up to `num` real test patches (H, W, 3) for each level's number, and the rule by which they were taken.

    Patches come from the cache that the training left. Without it the dictionary is empty and the text says why.
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
            found[k] = _pictures(patches, draw.permutation(chosen)[:num])
    rule = (
        f"score within {SCORE_WINDOW} of the level" if scored else "of the two classes; the data has no scores between"
    )
    return found, f"random patches of the test split, {rule}"

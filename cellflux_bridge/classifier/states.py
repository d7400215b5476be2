"""States of the flow's path with the soft labels of their targets: the training data of a time-aware guide."""

from typing import NamedTuple

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import derive_seed, torch_generator
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.config import Config, registry
from cellflux_bridge.data.pairs import build_pairs
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.path.base import Path


class LabelledBatch(NamedTuple):
    """Images in [-1, 1] or states x (B, C, H, W) and soft labels y (B, num_classes). States also have times t (B,) and,
    where the flow's network sees them, the clean sources x0 (B, C, H, W)."""

    x: torch.Tensor
    y: torch.Tensor
    t: torch.Tensor | None = None
    x0: torch.Tensor | None = None


class States:
    """Draws pairs, times and states as the flow of the same configuration does, in its own random stream. A state has
    the label of its target. `levels` (N, num_classes) are the flow's own, where it draws pairs by level.

    Raises UserError where the source class determines the target class, so that there is nothing to learn.
    """

    def __init__(
        self, config: Config, patches: Patches, labels: np.ndarray, *, split: str, levels: np.ndarray | None = None
    ):
        own = config.classifier.seed  # lest guides that are pooled have learnt from the very same states
        self._seed = derive_seed(config.seed, "states of the guide", *([own] if own else []))
        self._split, self._labels, self._source_image = split, torch.from_numpy(labels), config.condition.source_image
        self.path: Path = registry.build("path", config.path)
        self._codec = build_codec(config)
        size = config.classifier.train.batch_size
        sizes = {"batch_size": size, "key": "classifier.train.batch_size"}
        self._pairs = build_pairs(config, patches, split=split, seed=self._seed, levels=levels, **sizes)
        if levels is None:  # by level, any source goes to any target
            _require_choice(self._pairs.transitions, patches.classes, from_data=self.path.from_data)

    def batch(self, index: int, *, rank: int = 0, time: float | None = None) -> LabelledBatch:
        """The states of a batch of pairs, at the path's training times or all at one `time`."""
        pairs = self._pairs.batch(index, rank=rank)
        x0, x1 = map(self._codec.encode, pairs.patches())
        generator = torch_generator(self._seed, "path", self._split, index, rank)
        t = self.path.times(len(x0), generator=generator)
        if time is not None:
            t = torch.full_like(t, min(max(time, self.path.t_start), 1 - self.path.margin))
        x_t = self.path.sample(x0, x1, t, self.path.draw_noise(x0.shape, generator=generator)).x_t
        return LabelledBatch(x_t, self._labels[pairs.target_index], t, x0 if self._source_image else None)


def _require_choice(transitions: list[tuple[int, int]], classes: tuple[str, ...], *, from_data: bool) -> None:
    """A state on a path from data shows its source. If each source class has only one target class, the source tells
    the label and a guide learns nothing about targets."""
    sources, targets = map(set, zip(*transitions, strict=True))
    if len(targets) == 1 or (from_data and len(set(transitions)) == len(sources)):
        named = ", ".join(f"{classes[a]} -> {classes[b]}" for a, b in transitions)
        raise UserError(
            f"classifier.sees=state: with pairs.transitions {named} the source alone tells the target's class, so a "
            "guide would learn nothing about targets; set pairs.identity=true or add transitions"
        )

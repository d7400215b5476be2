"""What a network is told for a level, and which levels lie equally far apart, measured on a few held-out patches."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from lightning_fabric import Fabric

from cellflux_bridge import images as image_io
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.config import Config, GuidanceConfig, TranslateConfig
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.errors import UserError
from cellflux_bridge.guides import Guides
from cellflux_bridge.training import classifier
from cellflux_bridge.transport import stairs

# Held-out sources, and evenly spaced conditions from 0 to 1, that are measured.
_NUM_SOURCES, _NUM_CONDITIONS = 64, 11


class Pilot:
    """A progression of validation patches to conditions from 0 to 1, unguided, and what guides see in it.

    `patches()` are those of the run; `carry(x0, ids, settings, told=, wanted=)` makes the progression of sources x0
    (B, 3, S, S) in [-1, 1] to conditions (G,).
    """

    def __init__(
        self,
        *,
        config: Config,
        fabric: Fabric,
        guides: Guides,
        patches: Callable[[], Patches],
        carry: Callable[..., stairs.Stair],
    ):
        self._config, self._fabric, self._guides = config, fabric, guides
        self._patches, self._carry = patches, carry
        self._frames_of: dict[tuple, np.ndarray] = {}
        self._reached: dict[tuple, torch.Tensor] = {}

    def told(self, settings: TranslateConfig, levels: torch.Tensor) -> torch.Tensor:
        """The conditions (K,) in [0, 1] that the network is told for levels (K,) of a progression."""
        if settings.calibrate == "none":
            return levels
        key = (settings.calibrate, *self._guides.names(settings), *self._key(settings))
        if key not in self._reached:
            self._reached[key] = self._measure_reached(settings)
        return stairs.condition_for(levels, torch.linspace(0, 1, _NUM_CONDITIONS), self._reached[key])

    def adaptive_levels(self, settings: TranslateConfig) -> list[float]:
        """Levels whose frames lie equally far apart: the pilot's way is known by condition, so that of a level is the
        way to the condition that the network will be told for it."""
        steps = self._features(settings).diff(dim=0).norm(dim=2).mean(1)
        travelled = np.concatenate([[0.0], steps.cumsum(0).numpy()])
        grid = torch.linspace(0, 1, 10 * (_NUM_CONDITIONS - 1) + 1)
        way = np.interp(self.told(settings, grid).numpy(), np.linspace(0, 1, _NUM_CONDITIONS), travelled)
        chosen = stairs.equidistant_levels(grid, torch.from_numpy(np.diff(way)), settings.levels)
        levels = [round(level, 4) for level in chosen.tolist()]
        if levels[0] == 0 or any(a >= b for a, b in pairwise(levels)):
            raise UserError(
                f"translate.spacing=adaptive: the guide sees no {settings.levels} levels apart in what this network "
                "makes; set fewer levels, or spacing=uniform"
            )
        return levels

    def _key(self, settings: TranslateConfig) -> tuple:
        return (settings.source, settings.target, settings.solver, settings.steps, settings.guidance_scale)

    def _frames(self, settings: TranslateConfig) -> np.ndarray:
        """Frames (G, B, C, H, W) uint8 of validation patches carried to G conditions from 0 to 1, unguided."""
        key = self._key(settings)
        if key not in self._frames_of:
            patches = self._patches()
            chosen = patches.sample("val", settings.source, num=_NUM_SOURCES, seed=self._config.seed)
            if len(chosen) == 0:
                raise UserError(
                    f"translate.calibrate, spacing=adaptive: no validation patch of class {settings.source!r} to "
                    "measure on; raise data.split.val, or set calibrate=none and spacing=uniform"
                )
            x0 = image_io.encode(patches.centre(chosen)).to(self._fabric.device)
            unguided = settings.model_copy(update={"guidance": GuidanceConfig()})
            grid = torch.linspace(0, 1, _NUM_CONDITIONS)
            with self._fabric.autocast():
                stair = self._carry(x0, [patches.ids[i] for i in chosen], unguided, told=grid, wanted=grid)
            self._frames_of[key] = image_io.decode(stair.frames[1:]).cpu().numpy()
        return self._frames_of[key]

    def _features(self, settings: TranslateConfig) -> torch.Tensor:
        """The guides' features (G, B, D) of the pilot's frames."""
        guides, frames = self._guides.load(settings.guidance, sees="image"), self._frames(settings)
        features = [
            np.concatenate([self._ask(classifier.features, guide, level) for guide in guides], axis=1)
            for level in frames
        ]
        return torch.from_numpy(np.stack(features))

    def _measure_reached(self, settings: TranslateConfig) -> torch.Tensor:
        """The level (G,) that the pilot's frames have at its conditions, by what `calibrate` says."""
        if settings.calibrate == "distance":
            features = self._features(settings)
            distances = (features - features[0]).norm(dim=2).mean(1)
            return distances / distances[-1].clamp_min(1e-12)
        guides, frames = self._guides.load(settings.guidance, sees="image"), self._frames(settings)
        seen = np.stack([[self._ask(classifier.predict, guide, level) for guide in guides] for level in frames])
        target = self._config.data.classes.index(settings.target)
        return torch.from_numpy(seen[..., target].mean((1, 2)))

    def _ask(self, what: Callable, guide: PatchClassifier, frames: np.ndarray) -> np.ndarray:
        return what(guide, torch.from_numpy(frames), device=self._fabric.device)

"""What a network is told for a level, and which levels lie equally far apart, measured on a few held-out patches.

<run>/calibration/<hash>.json    what was measured, and with which settings, weights and guides
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric

from cellflux_bridge import images as image_io
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.guides import Guides
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.field.settings import GuidanceConfig
from cellflux_bridge.training.loop import from_rank_zero
from cellflux_bridge.translation.settings import TranslateConfig
from cellflux_bridge.transport import stairs

# Held-out sources, and evenly spaced conditions from 0 to 1, that are measured.
_NUM_SOURCES, _NUM_CONDITIONS = 64, 11
# Of the coarse stair that calibrates one source: conditions, and steps to each.
_NUM_OWN, _OWN_STEPS = 8, 2
# Settings of a translation that the measured numbers depend on.
_HEEDED = ("source", "target", "solver", "steps", "guidance_scale", "noise_resampling")


class Measured(NamedTuple):
    """What guides see at G conditions, on average over sources: the probability of the target class (G), the distance
    in features from what condition 0 gives (G), and that between neighbouring conditions (G - 1)."""

    probability: list[float]
    distance: list[float]
    steps: list[float]


class LevelCalibration:
    """A progression of validation patches to conditions from 0 to 1, unguided, and what guides see in it.

    `patches()` are those of the run; `carry(x0, ids, settings, grid)` makes the progression of sources x0 (B, 3, S, S)
    in [-1, 1] to conditions (G,) with the network of the digest `weights`. What was measured is kept in the run's
    folder, where there is one that can be written to, and holds for these weights, so that no patches are needed the
    next time.
    """

    def __init__(
        self,
        *,
        config: Config,
        fabric: Fabric,
        weights: str,
        guides: Guides,
        patches: Callable[[], Patches],
        carry: Callable[..., stairs.Stair],
    ):
        self._config, self._fabric, self._weights, self._guides = config, fabric, weights, guides
        self._patches, self._carry = patches, carry
        self._known: dict[tuple, Measured] = {}

    def told(self, settings: TranslateConfig, levels: torch.Tensor) -> torch.Tensor:
        """The conditions (K,) in [0, 1] that the network is told for levels (K,) of a progression."""
        if settings.calibrate == "none":
            return levels
        measured = self._measured(settings)
        reached = torch.tensor(measured.probability)
        if settings.calibrate == "distance":
            distance = torch.tensor(measured.distance)
            reached = distance / distance[-1].clamp_min(1e-12)
        return stairs.condition_for(levels, torch.linspace(0, 1, _NUM_CONDITIONS), reached)

    def told_each(
        self,
        settings: TranslateConfig,
        levels: torch.Tensor,
        x0: torch.Tensor,
        carry: Callable[..., stairs.Stair],
    ) -> tuple[torch.Tensor, int]:
        """The conditions (K, B) in [0, 1] that the network is told for levels (K,) of sources x0 (B, C, H, W), each by
        what guides see in a coarse, unguided stair of its own, and the forwards that it took.

        `carry(settings, told=, wanted=)` makes stairs of these sources.
        """
        grid = torch.linspace(0, 1, _NUM_OWN)
        coarse = settings.model_copy(update={"guidance": GuidanceConfig(), "steps": _OWN_STEPS})
        stair = carry(coarse, told=grid[1:], wanted=grid[1:])
        guides = self._guides.load(settings.guidance, sees="image")
        seen = [self._seen(guides, frames, settings) for frames in image_io.decode(stair.frames).cpu()]
        reached = torch.from_numpy(np.stack([probability for probability, _ in seen]))
        if settings.calibrate == "distance":
            distance = torch.from_numpy(np.stack([np.linalg.norm(x - seen[0][1], axis=1) for _, x in seen]))
            reached = distance / distance[-1].clamp_min(1e-12)
        each = [stairs.condition_for(levels, grid, of) for of in reached.unbind(1)]
        return torch.stack(each, dim=1), stair.nfe

    def _seen(
        self, guides: Sequence[PatchClassifier], frames: torch.Tensor, settings: TranslateConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """What guides see in frames (B, C, H, W) uint8: mean probability of the target (B,), all features (B, F)."""
        target, device = self._config.data.classes.index(settings.target), self._fabric.device
        probabilities = [inference.predict(guide, frames, device=device)[:, target] for guide in guides]
        features = [inference.features(guide, frames, device=device) for guide in guides]
        return np.mean(probabilities, axis=0), np.concatenate(features, axis=1)

    def adaptive_levels(self, settings: TranslateConfig) -> list[float]:
        """Levels whose frames lie equally far apart: the pilot's way is known by condition, so that of a level is the
        way to the condition that the network will be told for it."""
        travelled = np.concatenate([[0.0], np.cumsum(self._measured(settings).steps)])
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

    def share(self, settings: TranslateConfig) -> None:
        """Measure what a translation needs in one process for all of them; every process must call this."""
        if settings.needs_pilot:
            self._known[self._key(settings)] = from_rank_zero(self._fabric, lambda: self._measured(settings))

    def _key(self, settings: TranslateConfig) -> tuple:
        return (*(getattr(settings, key) for key in _HEEDED), *self._guides.named(settings.guidance, sees="image"))

    def _measured(self, settings: TranslateConfig) -> Measured:
        key = self._key(settings)
        if key not in self._known:
            self._known[key] = self._kept_or_measured(settings)
        return self._known[key]

    def _kept_or_measured(self, settings: TranslateConfig) -> Measured:
        made_with = self._made_with(settings)
        name = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
        path = self._config.output / "calibration" / f"{name}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["made_with"] == made_with:
                return Measured(**kept["measured"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or damaged: it is made anew
        measured = self._measure(settings)
        if self._config.output.is_dir():
            try:
                path.parent.mkdir(exist_ok=True)
                replace_text(
                    path, json.dumps({"made_with": made_with, "measured": measured._asdict()}, indent=1) + "\n"
                )
            except OSError as error:
                self._fabric.print(f"{path}: cannot be written ({error.strerror}); the next use measures it again")
        return measured

    def _made_with(self, settings: TranslateConfig) -> dict[str, Any]:
        """All that the measured numbers depend on. Not where the patches lie: validation patches are the run's own."""
        return {
            **{key: getattr(settings, key) for key in _HEEDED},
            "seed": self._config.seed,
            "sources": _NUM_SOURCES,
            "conditions": _NUM_CONDITIONS,
            "network": self._weights,
            "guides": self._guides.named(settings.guidance, sees="image"),
        }

    def _measure(self, settings: TranslateConfig) -> Measured:
        guides = self._guides.load(settings.guidance, sees="image")
        seen = [self._seen(guides, frames, settings) for frames in torch.from_numpy(self._frames(settings))]
        features = np.stack([found for _, found in seen])
        return Measured(
            probability=[float(probability.mean()) for probability, _ in seen],
            distance=np.linalg.norm(features - features[0], axis=2).mean(1).tolist(),
            steps=np.linalg.norm(np.diff(features, axis=0), axis=2).mean(1).tolist(),
        )

    def _frames(self, settings: TranslateConfig) -> np.ndarray:
        """Frames (G, B, C, H, W) uint8 of validation patches carried to the conditions."""
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
            stair = self._carry(x0, [patches.ids[i] for i in chosen], unguided, grid)
        return image_io.decode(stair.frames[1:]).cpu().numpy()

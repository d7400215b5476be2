"""What guides see in images that a flow makes under conditions from 0 to 1, measured on a few held-out patches.

<run>/calibration/<hash>.json    what was measured, and with which settings, weights and guides
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.guides import Guides
from cellflux_bridge.codec.base import Codec
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.training.loop import from_rank_zero
from cellflux_bridge.translation.settings import TranslateConfig
from cellflux_bridge.transport.base import Measured, Result, source_noise

# Held-out sources, and evenly spaced conditions from 0 to 1, that are measured.
_NUM_SOURCES, _NUM_CONDITIONS = 32, 11
# Settings of a translation that the measured numbers depend on.
_DEPENDS_ON = ("source", "target", "solver", "steps", "guidance_scale", "noise_resampling")


@dataclass(frozen=True, kw_only=True)
class LevelCalibration:
    """The guides as a `transport.base.LevelMeter`, for one translation.

    `patches()` are those of the run. What was measured of the network of digest `weights` is kept in the run's folder,
    where it can be written to, and in `memory`, so that no patches are needed the next time.
    """

    config: Config
    fabric: Fabric
    codec: Codec
    weights: str
    guides: Guides
    patches: Callable[[], Patches]
    settings: TranslateConfig
    memory: dict[str, Measured]

    def see(self, states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        guides = self.guides.load(self.settings.guidance, sees="image")
        target, device = self.config.data.classes.index(self.settings.target), self.fabric.device
        probabilities, features = [], []
        for frames in self.codec.to_uint8(states).cpu():
            probabilities.append([inference.predict(guide, frames, device=device)[:, target] for guide in guides])
            found = [inference.features(guide, frames, device=device) for guide in guides]
            features.append(np.concatenate(found, axis=1))
        return np.mean(probabilities, axis=1), np.stack(features)

    def share(self, make: Callable[..., Result]) -> None:
        self.memory[self._name()] = from_rank_zero(self.fabric, lambda: self.measured(make))

    def measured(self, make: Callable[..., Result]) -> Measured:
        if (name := self._name()) not in self.memory:
            self.memory[name] = self._kept_or_measured(name, make)
        return self.memory[name]

    def _name(self) -> str:
        return hashlib.sha256(json.dumps(self._made_with(), sort_keys=True).encode()).hexdigest()[:16]

    def _kept_or_measured(self, name: str, make: Callable[..., Result]) -> Measured:
        made_with, path = self._made_with(), self.config.output / "calibration" / f"{name}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: it is made anew
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["made_with"] == made_with:
                return Measured(**kept["measured"])
        measured = self._measure(make)
        if self.config.output.is_dir():
            text = json.dumps({"made_with": made_with, "measured": measured._asdict()}, indent=1) + "\n"
            try:
                path.parent.mkdir(exist_ok=True)
                replace_text(path, text)
            except OSError as error:
                self.fabric.print(f"{path}: cannot be written ({error.strerror}); the next use measures it again")
        return measured

    def _made_with(self) -> dict[str, Any]:
        """All that the measured numbers depend on. Not where the patches lie: validation patches are the run's own."""
        return {
            **{key: getattr(self.settings, key, None) for key in _DEPENDS_ON},
            "seed": self.config.seed,
            "sources": _NUM_SOURCES,
            "conditions": _NUM_CONDITIONS,
            "network": self.weights,
            "guides": self.guides.named(self.settings.guidance, sees="image"),
        }

    def _measure(self, make: Callable[..., Result]) -> Measured:
        patches, source, seed = self.patches(), self.settings.source, self.config.seed
        chosen = patches.sample("val", source, num=_NUM_SOURCES, seed=seed)
        if len(chosen) == 0:
            raise UserError(
                f"translate.calibrate, spacing=adaptive: no validation patch of class {source!r} to "
                "measure on; raise data.split.val, or set calibrate=none and spacing=uniform"
            )
        self.fabric.print(f"calibrating levels: {len(chosen)} validation patches at {_NUM_CONDITIONS} conditions")
        x0 = self.codec.encode(patches.centre(chosen).to(self.fabric.device))
        noise = source_noise(x0.shape[1:], [patches.ids[i] for i in chosen], seed=seed).to(x0)
        with self.fabric.autocast():
            result = make(x0, noise=noise, conditions=torch.linspace(0, 1, _NUM_CONDITIONS))
        probability, features = self.see(result.frames[1:])
        return Measured(
            probability=probability.mean(1).tolist(),
            distance=np.linalg.norm(features - features[0], axis=2).mean(1).tolist(),
            steps=np.linalg.norm(np.diff(features, axis=0), axis=2).mean(1).tolist(),
        )

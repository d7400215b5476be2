"""What a flow makes at level 1 beside real patches of the target: can they be told apart?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.statistics import half_splits
from cellflux_bridge.classifier import inference
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.metrics.bands import KINDS, statistics
from cellflux_bridge.metrics.damage import BLUR, DAMAGES, in_blurs
from cellflux_bridge.metrics.fidelity import kid
from cellflux_bridge.metrics.networks import FORWARD
from cellflux_bridge.metrics.nuclei import extractor_for
from cellflux_bridge.metrics.two_sample import feature_scores, logistic_scores, two_sample
from cellflux_bridge.metrics.verdict import TOLD

# How a level of 1 is made alone, so that the pictures say what the flow can do and not how it was steered.
ALONE = ("translate.method=progression", "translate.guidance.form=none", "translate.calibrate=none")
ALONE += ("translate.calibrate_each=false", "translate.spacing=uniform", "translate.levels=[1.0]")
_SOURCES, _BATCH = 100, 50
_BLURRED_SPLITS = 10
# The validation error of a finished training falls by less in its last quarter.
_FALLING = 0.05


class LevelOne(NamedTuple):
    """Images of level 1 `made` (N, C, H, W) uint8 and real target patches, with their groups' names."""

    made: np.ndarray
    real: np.ndarray
    groups: np.ndarray
    real_groups: np.ndarray

    def auc(self) -> dict[str, float]:
        """The two-sample AUCs by grey and by colour bands."""
        bands, sides = (statistics(self.made), statistics(self.real)), (self.groups, self.real_groups)
        return {
            kind: two_sample(*(of[:, part] for of in bands), *sides, scores_of=logistic_scores).value
            for kind, part in KINDS.items()
        }

    def by_nuclei(self, patches: Patches) -> dict[str, float]:
        """What the nuclei network sees: the two-sample AUC, and the distance in blurs of a pixel (`damage.in_blurs`);
        NaN where it cannot look at the patches."""
        model, on = extractor_for(patches), {"device": torch.device("cpu"), "chunk": FORWARD}
        if model is None:
            return {"auc_nuclei": float("nan"), "blurs_nuclei": float("nan")}
        draw, groups = numpy_generator(0, "benchmark", "blur"), self.real_groups
        stacks = self.made, self.real, DAMAGES[BLUR](self.real, draw)
        made, real, blurred = (inference.features(model.eval(), torch.from_numpy(of), **on) for of in stacks)
        halves = half_splits(groups, num=_BLURRED_SPLITS, generator=draw)
        of_blurred = [kid(blurred[a], real[b], groups=groups[a], real_groups=groups[b]).value for a, b in halves]
        found = kid(made, real, groups=self.groups, real_groups=groups).value
        return {
            "auc_nuclei": two_sample(made, real, self.groups, groups, scores_of=feature_scores).value,
            "blurs_nuclei": in_blurs(found, float(np.mean(of_blurred))) if of_blurred else float("nan"),
        }


def level_one(bridge: Any, *, split: str, num: int) -> LevelOne:
    """Level 1 of `num` sources of a split by a Bridge that was loaded with `ALONE`, and as many real patches."""
    patches, settings, classes = bridge.patches(), bridge.config.translate, bridge.classes
    draw, names = numpy_generator(0, "benchmark"), np.array(patches.group_names)
    ends = settings.source or classes[0], settings.target or classes[-1]
    sources, real = (np.sort(draw.permutation(patches.indices(split, label))[:num]) for label in ends)
    parts = np.array_split(sources, -(-len(sources) // _BATCH))
    made = [bridge.translate(patches.centre(part), source=ends[0], target=ends[1]).frames[-1] for part in parts]
    groups = (names[patches.groups[of]] for of in (sources, real))
    return LevelOne(np.concatenate(made), patches.centre(real).numpy(), *groups)


def still_falling(log: Path, name: str = "val/velocity_mse") -> float | None:
    """By which share a logged error fell in the last quarter of the updates; None where it was not logged there."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [(row["step"], row[name]) for row in rows if name in row]
    before = [value for step, value in found if step <= 0.75 * found[-1][0]] if found else []
    return 1 - found[-1][1] / before[-1] if before and before[-1] > 0 else None


def too_little(bridge: Any, run: Path) -> Sequence[str]:
    """Sentences on whether a by-level flow that was just trained is finished, and the command that trains it longer."""
    told = level_one(bridge, split="val", num=_SOURCES).auc()["grey"]
    lines = [f"level 1 of validation sources is told from real patches with AUC {told:.2f} (0.5 is best)"]
    if np.isnan(told):
        lines = ["level 1 is not compared with real patches: a class has fewer than two groups in the validation split"]
    fell, reasons = still_falling(run / "metrics.jsonl"), []
    if fell is not None and fell > _FALLING:
        reasons.append(f"its validation error fell by {fell:.0%} in the last quarter")
    if told > TOLD[0]:
        reasons.append(f"this AUC is above {TOLD[0]:g}")
    if reasons:
        lines.append(f"TOO LITTLE TRAINING, perhaps: {' and '.join(reasons)}. Look at samples/. To go on:")
        train = bridge.config.train
        limits = [key for key in ("max_minutes", "max_cpu_minutes") if getattr(train, key) is not None] or ["steps"]
        longer = " ".join(f"train.{key}={2 * getattr(train, key):g}" for key in limits)
        lines.append(f"  cellflux-bridge train {run} {longer}")
    return lines

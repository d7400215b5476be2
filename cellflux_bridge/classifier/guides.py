"""The classifiers that steer a flow or measure its levels: which ones a translation uses, and whether they fit."""

from pathlib import Path

import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.config import Config
from cellflux_bridge.config.registry import trusting, trusts_everything
from cellflux_bridge.field.settings import GuidanceConfig


def seen_by(guidance: GuidanceConfig) -> str:
    """What the guides of a form look at: states of the path, or finished images."""
    return "state" if guidance.form in ("score", "bridge", "sharpen") else "image"


class Guides:
    """The guides of a run, each loaded once and refused where it does not fit the run's flow."""

    def __init__(self, config: Config, device: torch.device):
        self._config, self._device = config, device
        self._trust = trusts_everything()
        self._loaded: dict[tuple[Path, str], tuple[str, PatchClassifier]] = {}

    def load(self, guidance: GuidanceConfig, *, sees: str) -> list[PatchClassifier]:
        """The guides of images ("image") or of states ("state"), at least one; UserError where one does not fit."""
        return [self._load(run, sees=sees)[1] for run in self._runs(guidance, sees=sees)]

    def names(self, guidance: GuidanceConfig, *, measure: bool) -> list[str]:
        """The names, as `named` gives them, of all guides that a translation uses: those that steer, and guides of
        images where they `measure` levels. Another guide makes another translation."""
        kinds = {seen_by(guidance)} if guidance.form != "none" else set()
        kinds |= {"image"} if measure else set()
        return [name for sees in sorted(kinds) for name in self.named(guidance, sees=sees)]

    def named(self, guidance: GuidanceConfig, *, sees: str) -> list[str]:
        """name@step:weights of the guides that `load` gives; a guide that was trained again has another name."""
        return [self._load(run, sees=sees)[0] for run in self._runs(guidance, sees=sees)]

    def _runs(self, guidance: GuidanceConfig, *, sees: str) -> list[Path]:
        """The run folders of guides: those that the settings name, otherwise all of the flow's own run."""
        output = self._config.output
        own = [run for run in sorted(output.glob("guide_*")) if run.name.endswith("_state") == (sees == "state")]
        runs = (guidance.guides if sees == seen_by(guidance) else []) or own
        if not runs:
            raise UserError(
                f"{output}: no trained guide here; make one with: cellflux-bridge train-classifier "
                f"{output} classifier.role=guide classifier.sees={sees}"
            )
        return runs

    def _load(self, run: Path, *, sees: str) -> tuple[str, PatchClassifier]:
        if (run, sees) in self._loaded:
            return self._loaded[run, sees]
        folder = checkpoint.latest(run)
        with trusting(self._trust):
            trained = checkpoint.read_config(folder)
            if trained.classifier.role != "guide":
                raise UserError(f"{run}: is a judge; a guide must be another network (classifier.role=guide)")
            compared = ["data.classes", "data.image_size", "data.crop", "data.stain"]
            if sees == "state":
                compared += ["path", "codec", "condition.source_image"]
            pairs = [(key, trained.value(key), self._config.value(key)) for key in compared]
            pairs.append(("classifier.sees", trained.classifier.sees, sees))
            if problems := [f"{key} is {there} there, {here} here" for key, there, here in pairs if there != here]:
                raise UserError(f"{run}: a guide that does not fit this flow: {'; '.join(problems)}")
            guide = inference.load(folder, self._device)
        name = f"{run.name}@{checkpoint.step_of(folder)}:{checkpoint.weights_digest(guide)[:16]}"
        self._loaded[run, sees] = name, guide
        return name, guide

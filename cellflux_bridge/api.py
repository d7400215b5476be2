"""A bridge as a Python object: `Bridge.train("patches", source="benign", target="malignant").translate("a.png")`."""

import json
from argparse import Namespace
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning_fabric import Fabric

from cellflux_bridge import checkpoint
from cellflux_bridge.base.files import run_of
from cellflux_bridge.classifier.guides import seen_by
from cellflux_bridge.cli.places import configuration
from cellflux_bridge.config import load_config, parse_overrides, registry
from cellflux_bridge.config.registry import trusting
from cellflux_bridge.data.layout.folder import Folder
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.flow.network import FLOW_SECTIONS, build_flow
from cellflux_bridge.training.run import require_alike
from cellflux_bridge.translation.base import translation_fabric
from cellflux_bridge.translation.flow import FlowTranslator

# Updates of a training that minutes end.
_NO_END = 10**9


class Bridge(FlowTranslator):
    """A trained flow with all it needs to carry images from one class to another: see `translate`."""

    @classmethod
    def train(
        cls,
        where: str | Path,
        *,
        source: str | None = None,
        target: str | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        device: str | None = None,
        output: str | Path | None = None,
        overrides: Sequence[str] = (),
    ) -> "Bridge":
        """Train a flow and the classifiers that its translations ask, and load it; a stopped training goes on.

        `where` is a folder of patches (trained as configs/own.yaml says), a YAML file, or a run's folder. `source` and
        `target` are classes: level 0 and level 1; other classes of a folder are left out. The flow's training ends
        after `steps` updates or, instead, `minutes`, in which case the learning rate stays as it is; shortcuts, the
        refiner and the classifiers are trained after it, for as long as the configuration says. `device` is cpu, cuda,
        cuda:1 or mps; `output` the run's folder (runs/<name of `where`>). `overrides` are further `key.sub=value`
        settings. Raises UserError as the commands do.
        """
        from cellflux_bridge.cli import train, train_classifier

        path = Path(where).expanduser()
        given: dict[str, object] = {"translate.source": source, "translate.target": target, "train.steps": steps}
        if path.is_dir() and not (path / checkpoint.CONFIG).exists():
            given |= {"data.root": str(path), "name": path.resolve().name}
            path = Path(str(files("cellflux_bridge.config") / "own.yaml"))
            if source and target:
                labels = {record.label for record in Folder(Path(where).expanduser()).records()}
                if {source, target} < labels:
                    given["data.layout.ignore"] = sorted(labels - {source, target})
        if source and target:
            given["data.classes"] = [source, target]
        if minutes is not None:
            given |= {"train.max_minutes": minutes, "train.lr_decay": "none", "train.steps": steps or _NO_END}
        if device is not None:
            kind, _, number = device.partition(":")
            for section in ("train", "classifier.train"):
                given |= {f"{section}.accelerator": kind, f"{section}.devices": f"{number}," if number else 1}
        given["output"] = None if output is None else str(output)
        keys = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        keys += overrides
        with trusting(False):  # what the user's own file names is then accepted in the run made from it
            train.run(Namespace(config=path, overrides=keys))
            run = configuration(path, keys).output
            guidance = load_config(run / checkpoint.CONFIG, output=run).translate.guidance
            for sees in dict.fromkeys(["image", *([seen_by(guidance)] if guidance.form != "none" else [])]):
                guide = ["classifier.role=guide", f"classifier.sees={sees}"]
                train_classifier.run(Namespace(config=path, overrides=[*keys, *guide]))
            return cls.load(run)

    @classmethod
    def load(
        cls, run: str | Path, overrides: Sequence[str] = (), *, fabric: Fabric | None = None, trust: bool = False
    ) -> "Bridge":
        """The newest checkpoint of a run folder (or a checkpoint folder itself).

        `overrides` are `key.sub=value` settings of this use, such as translate.steps=50; the network's architecture
        always comes from the checkpoint. With `trust`, classes of foreign modules that the run names are imported,
        which runs their code, and caches and phantoms are made where it says. Raises UserError for a folder without
        checkpoint, and for weights that do not fit.
        """
        with trusting(trust):
            folder = checkpoint.latest(Path(run))
            trained = checkpoint.read_config(folder)
            network = checkpoint.load_network(folder, lambda: build_flow(trained)[1])
            # The run's own file may have newer settings of translation than its last checkpoint, and may have moved.
            config = load_config(Path(run) / checkpoint.CONFIG, overrides, output=run_of(Path(run)))
            require_alike(folder, trained, config, uses=FLOW_SECTIONS)
            return cls(
                config=config,
                path=registry.build("path", trained.path),
                network=network,
                step=checkpoint.step_of(folder),
                preprocessing=Preprocessing.load(folder / checkpoint.PREPROCESSING),
                fabric=fabric or translation_fabric(config.train, section="train"),
                given=parse_overrides(overrides).get("translate"),
            )

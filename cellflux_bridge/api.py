"""A trained bridge as a Python object: `Bridge.load("runs/lung").translate(images)`."""

from collections.abc import Sequence
from pathlib import Path

from lightning_fabric import Fabric

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import run_of
from cellflux_bridge.config import load_config, parse_overrides, registry
from cellflux_bridge.config.registry import trusting
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.training.run import differences
from cellflux_bridge.translation.base import translation_fabric
from cellflux_bridge.translation.flow import FlowTranslator


class Bridge(FlowTranslator):
    """A trained flow with all it needs to carry images from one class to another: see `translate`."""

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
            if differing := differences(trained, config, ignore=("train", "classifier", "ddim", "translate")):
                raise UserError(f"{folder}: was trained otherwise and cannot be used with {', '.join(differing)}")
            return cls(
                config=config,
                path=registry.build("path", trained.path),
                network=network,
                step=checkpoint.step_of(folder),
                preprocessing=Preprocessing.load(folder / checkpoint.PREPROCESSING),
                fabric=fabric or translation_fabric(config.train, section="train"),
                given=parse_overrides(overrides).get("translate"),
            )

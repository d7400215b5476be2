"""`cellflux-bridge train-nuclei`"""

import argparse

from cellflux_bridge.cli.places import tell_trained


def run(args: argparse.Namespace) -> None:
    """train-nuclei CONFIG_OR_RUN: train a network that finds nuclei, on your own label maps or to fine-tune."""
    from pathlib import Path

    from cellflux_bridge.cellularity.network import read_weights, write_half
    from cellflux_bridge.cellularity.settings import NucleiConfig
    from cellflux_bridge.cellularity.task import NucleiTask
    from cellflux_bridge.config import load_config
    from cellflux_bridge.training.loop import fit
    from cellflux_bridge.training.processes import make_fabric, on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, require_free

    path = Path(args.config)
    where = path / "config.yaml" if path.is_dir() else path
    config = load_config(where, args.overrides, output=path if path.is_dir() else None, schema=NucleiConfig)
    fabric = make_fabric(config.train, section="train")
    fabric.launch()
    fabric.seed_everything(config.seed, verbose=False)
    task = NucleiTask(config)  # refuses what cannot be trained before anything is written

    def prepare() -> None:
        require_free(config.output, config, resume=config.train.resume)
        claim(config.output, config)

    on_rank_zero(fabric, prepare)
    newest = fit(task, config, config.train, folder=config.output, fabric=fabric)
    if fabric.is_global_zero:
        tell_trained(newest, last_values(config.output, "val/"))
        write_half(read_weights(config.output), config.output / "nuclei.safetensors")
        print(f"wrote: {config.output / 'nuclei.safetensors'}, in half precision, as the built-in one is stored")

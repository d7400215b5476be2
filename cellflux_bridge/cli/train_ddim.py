"""`cellflux-bridge train-ddim`"""

import argparse

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration, start, tell_trained


def run(args: argparse.Namespace) -> None:
    """train-ddim CONFIG_OR_RUN: train the reference bridge's denoiser, then its noisy classifier."""
    from cellflux_bridge.ddim.task import STAGES, refuse_unfit, used_stages
    from cellflux_bridge.training.loop import fit
    from cellflux_bridge.training.processes import on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, record_splits, require_free

    config = configuration(args.config, args.overrides)
    refuse_unfit(config)
    fabric, config, patches = start(config, config.ddim.denoiser.train, section="ddim.denoiser.train")
    tasks = {name: STAGES[name](config, patches) for name in used_stages(config)}

    def prepare() -> None:
        if (config.output / "checkpoints").exists():
            raise UserError(f"{config.output}: holds a flow's run; choose another output for the bridge")
        # Everything is asked for before anything is written.
        for name, task in tasks.items():
            how = {"resume": task.settings(config).train.resume, "section": f"ddim.{task.key}.train"}
            require_free(config.output / name, config, uses=task.uses, ignore=task.unused, **how)
        record_splits(config.output, patches)
        for folder in (config.output, *(config.output / name for name in tasks)):
            claim(folder, config)

    on_rank_zero(fabric, prepare)
    for name, task in tasks.items():
        newest = fit(task, config, task.settings(config).train, folder=config.output / name, fabric=fabric)
        if fabric.is_global_zero:
            tell_trained(newest, last_values(config.output / name, "val/"))

"""`cellflux-bridge train`"""

import argparse
from functools import partial

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cli.places import configuration, holds_ddim, start, tell_trained


def run(args: argparse.Namespace) -> None:
    """train CONFIG_OR_RUN: train the flow; a stopped training goes on."""
    from cellflux_bridge import checkpoint
    from cellflux_bridge.api import Bridge
    from cellflux_bridge.data.pairs import left_out
    from cellflux_bridge.flow.levels import target_levels
    from cellflux_bridge.flow.network import FLOW_SECTIONS, build_flow
    from cellflux_bridge.flow.shortcut import SHORTCUT, SHORTCUT_SECTIONS, ShortcutTask, build_shortcut, record_flow
    from cellflux_bridge.flow.task import IGNORED, FlowTask, ignores_condition
    from cellflux_bridge.metrics.level_one import ALONE, too_little
    from cellflux_bridge.refiner.model import REFINER, REFINER_SECTIONS, build_refiner
    from cellflux_bridge.refiner.task import RefinerTask
    from cellflux_bridge.training.loop import fit
    from cellflux_bridge.training.processes import on_rank_zero
    from cellflux_bridge.training.run import claim, last_values, record_splits, require_free

    config = configuration(args.config, args.overrides)
    # What cannot fit is said before anything is decoded; for that, any classes will do that no part asks for by name.
    if not config.condition.parts:
        data = config.data.model_copy(update={"classes": config.data.classes or ["A", "B"]})
        (build_shortcut if config.shortcut.steps else build_flow)(config.model_copy(update={"data": data}))
    if config.refiner.scale:
        build_refiner(config)
    fabric, config, patches = start(config, config.train, section="train")
    by_level = config.condition.target == "level"
    if by_level and len(config.data.classes) == 2:
        fabric.print("level 0 = {}, level 1 = {}".format(*config.data.classes))
    crossfit = by_level and config.condition.level == "crossfit"
    # What is trained beside the flow: its folder, its settings, and what of a configuration it depends on.
    companions = [(SHORTCUT, config.shortcut.train, SHORTCUT_SECTIONS)] if config.shortcut.steps else []
    companions += [(REFINER, config.refiner.train, REFINER_SECTIONS)] if config.refiner.scale else []

    def prepare() -> None:
        if holds_ddim(config.output):
            raise UserError(f"{config.output}: holds a reference bridge's run; choose another output for the flow")
        uses = (*FLOW_SECTIONS, "train", *(("classifier",) if crossfit else ()))
        require_free(config.output, config, uses=uses, resume=config.train.resume)
        done = checkpoint.step_of(checkpoint.latest(config.output)) if checkpoint.exists(config.output) else 0
        has_shortcuts = config.shortcut.steps and checkpoint.exists(config.output / SHORTCUT)
        if has_shortcuts and done < config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps}: {config.output} has shortcuts of the flow as it is, after {done} "
                f"updates; remove {config.output / SHORTCUT} first, and they are trained again after it"
            )
        for name, how, of in companions:
            require_free(config.output / name, config, uses=of, resume=how.resume, section=f"{name}.train")
        record_splits(config.output, patches)
        for folder in (config.output, *(config.output / name for name, *_ in companions)):
            claim(folder, config)

    task = FlowTask(config, patches)  # refuses what cannot be trained before anything is written
    if config.shortcut.steps:
        ShortcutTask(config, patches)
    on_rank_zero(fabric, prepare)
    if task.unmatched:
        fabric.print(left_out(task.unmatched))
    levels = None
    if by_level:
        levels = target_levels(config, patches, folder=config.output, fabric=fabric)
        fabric.seed_everything(config.seed, verbose=False)  # cross-fitting drew, where it was not done already
        task = FlowTask(config, patches, levels=levels)
    trained_before = {path.name for path in (config.output / "checkpoints").glob("step-*[0-9]")}
    newest = fit(task, config, config.train, folder=config.output, fabric=fabric)
    for name, how, _ in companions:
        if name == SHORTCUT:
            companion = ShortcutTask(config, patches, levels=levels)
            on_rank_zero(fabric, partial(record_flow, config.output, companion.begin()))
        else:
            companion = RefinerTask(config, patches)
        fit(companion, config, how, folder=config.output / name, fabric=fabric)
    if fabric.is_global_zero:
        figures = last_values(config.output, "val/")
        tell_trained(newest, figures)
        if ignores_condition(figures):
            print(IGNORED.format(**{key.partition("/")[2]: value for key, value in figures.items()}))
        if by_level and task.path.from_data and newest.name not in trained_before:
            print("\n".join(too_little(Bridge.load(config.output, ALONE, fabric=fabric), config.output)))

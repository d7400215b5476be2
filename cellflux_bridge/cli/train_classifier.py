"""`cellflux-bridge train-classifier`"""

import argparse

from cellflux_bridge.cli.places import configuration, start, tell_trained


def run(args: argparse.Namespace) -> None:
    """train-classifier CONFIG_OR_RUN: train a judge of translated patches, or a guide (classifier.role=guide)."""
    from cellflux_bridge import checkpoint
    from cellflux_bridge.classifier import inference
    from cellflux_bridge.classifier import scores as classifier_scores
    from cellflux_bridge.classifier.task import ClassifierTask
    from cellflux_bridge.flow.levels import read_levels, target_levels
    from cellflux_bridge.training.loop import fit
    from cellflux_bridge.training.processes import on_rank_zero
    from cellflux_bridge.training.run import Log, claim, require_free, require_held_out

    config = configuration(args.config, args.overrides)
    train = config.classifier.train
    of_states = config.classifier.sees == "state"
    folder = config.output / f"{config.classifier.role}_{config.classifier.view}{'_state' if of_states else ''}"
    fabric, config, patches = start(config, train, section="classifier.train", knows_unseen=False)
    uses = ("seed", "data", "classifier", *(("coupling", "path", "codec", "condition", "pairs") if of_states else ()))

    def prepare() -> None:
        require_free(folder, config, uses=uses, resume=train.resume, section="classifier.train")
        require_held_out(config.output, patches)
        claim(folder, config)

    levels, of_flow = None, config.output / "levels.csv"
    if of_states and config.condition.target == "level":
        if of_flow.exists():  # the very levels that the flow was trained with, whatever this classifier is
            levels = read_levels(of_flow, patches)
        else:
            levels = target_levels(config, patches, folder=config.output, fabric=fabric)
    task = ClassifierTask(config, patches, levels=levels)
    on_rank_zero(fabric, prepare)
    newest = fit(task, config, train, folder=folder, fabric=fabric)
    if fabric.is_global_zero:
        model = inference.load(newest, fabric.device)
        if of_states:
            scores = classifier_scores.state_scores(model, config, patches, device=fabric.device, levels=levels)
            if not scores["test/n"]:
                print("no figures of the test split: its patches have no level (a score, or a row in levels.csv)")
        else:
            labels = config.classifier.labels
            scores = classifier_scores.image_scores(model, patches, device=fabric.device, labels=labels)
        step = checkpoint.step_of(newest)
        Log(folder, from_step=step, tensorboard=False).write(step, scores)
        tell_trained(newest, scores)

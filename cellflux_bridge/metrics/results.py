"""An evaluation as files: metrics.json, metrics.csv in long form, tables in metrics.md and the judges' probabilities of
every single frame in metrics.frames.csv (trajectory, source_id, judge, level, probability), each whole or not at all.
`base.files.csv_rows` reads both CSVs.

metrics.json, format 1; a number that does not exist is null:

    format, source, target, num_levels, seed, max_real (`metrics.evaluate`)
    networks      [{name, use: judge | features | scores, view, checkpoint, image_size, digest}], a folder and a digest
                  of its weights
    methods       [{name, trajectory, method, config_hash, n, split, levels, frame_levels, device, unguided}], baselines
                  after them, with a null trajectory; `frame_levels` are the soft labels of the frames that stand for
                  `levels`; `device` is that of `seconds` ("cpu", "cuda: NAME", or null); a guided method is compared to
                  the method `unguided`
    values        [{trajectory, method, quantity, level, extractor, n, n_real, split, value, low, high}], as in
                  metrics.csv and `metrics.values`; `metrics.words` lists the quantities
    differences   [{first, second, quantity, extractor, n, difference, low, high, p, num_groups}], p of Wilcoxon's
                  signed-rank test on means of groups
    memorisation  {extractor, patches, num_training, num_held_out, num_near_copies, near_copies: [{method, trajectory,
                  source_id, level, training_id, distance, held_out}]}: at most the hundred worst frames that repeat a
                  training patch, or lie nearer to it (`distance`) than any held-out real patch lies to its nearest
                  training patch of that class (`held_out`), in the extractor's features; `num_held_out` are [those
                  nearest to training of the source, of the target], without those that repeat a training patch;
                  `patches` is the checkpoint in whose data `training_id` is
    warnings      [text]: sentences about figures that mislead
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellflux_bridge.base.files import csv_text, replace_text, require_json, without_nan
from cellflux_bridge.metrics.evaluate import Evaluation
from cellflux_bridge.metrics.sequences import Sequences
from cellflux_bridge.metrics.table import by_level, markdown
from cellflux_bridge.metrics.values import Value

FORMAT = 1
_MOST_COPIES = 100
FRAMES_SUFFIX = ".frames.csv"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of metrics.json."""
    keys = ("name", "use", "view", "checkpoint", "image_size", "digest")
    reference, extractor = evaluation.reference, evaluation.reference.extractor
    networks = [{key: getattr(network, key) for key in keys} for network in reference.networks]
    with_patches = extractor if extractor.weights is not None else reference.networks[0]
    copies = sorted(evaluation.near_copies, key=_share_of_held_out)[:_MOST_COPIES]
    return without_nan(
        {
            "format": FORMAT,
            "source": evaluation.transition[0],
            "target": evaluation.transition[1],
            "num_levels": evaluation.num_levels,
            "seed": reference.seed,
            "max_real": reference.max_real,
            "networks": [{**network, "checkpoint": str(network["checkpoint"])} for network in networks],
            "methods": [_method(of, evaluation) for of in (*evaluation.methods, *evaluation.baselines)],
            "values": [value._asdict() for value in evaluation.reference.rows],
            "differences": evaluation.differences,
            "memorisation": {
                "extractor": extractor.name,
                "patches": str(with_patches.checkpoint),
                "num_training": len(reference.training.ids),
                "num_held_out": [*map(len, reference.training.held_out)],
                "num_near_copies": len(evaluation.near_copies),
                "near_copies": copies,
            },
            "warnings": evaluation.warnings,
        }
    )


def _share_of_held_out(copy: dict[str, Any]) -> float:
    """The distance of a near copy over the least of held-out patches, 0 for an exact copy: the smaller, the worse."""
    return copy["distance"] / copy["held_out"] if copy["distance"] else 0.0


def _method(of: Sequences, evaluation: Evaluation) -> dict[str, Any]:
    is_baseline = of.folder is None
    return {
        "name": of.name,
        "trajectory": None if is_baseline else str(of.folder),
        "method": None if is_baseline else of.header.method,
        "config_hash": None if is_baseline else of.header.config_hash,
        "n": len(of.source_ids),
        "split": of.split,
        "levels": of.levels,
        "frame_levels": of.frame_levels,
        "device": None if of.cost is None else of.cost.device,
        "unguided": evaluation.unguided.get(of.name),
    }


def _frames(evaluation: Evaluation) -> Iterator[list[Any]]:
    """The rows of metrics.frames.csv."""
    yield ["trajectory", "source_id", "judge", "level", "probability"]
    for of in evaluation.methods:
        for judge in (judge.name for judge in evaluation.reference.judges):
            for source_id, row in zip(of.source_ids, of.outputs[judge].value, strict=True):
                for level, p in zip((0.0, *of.frame_levels), row, strict=True):
                    yield [str(of.folder), source_id, judge, level, f"{p:.4f}"]


def write_results(evaluation: Evaluation, output: Path) -> tuple[list[Path], str]:
    """Write `output` (a .json) and beside it .csv, .frames.csv and .md of its name; returns them and the main table."""
    require_json(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(evaluation)
    texts = {
        output: json.dumps(as_json(evaluation), indent=1, allow_nan=False) + "\n",
        output.with_suffix(".csv"): csv_text([Value._fields, *map(without_nan, evaluation.reference.rows)]),
        output.with_suffix(FRAMES_SUFFIX): csv_text(_frames(evaluation)),
        output.with_suffix(".md"): f"{table}\n{by_level(evaluation)}",
    }
    for path, text in texts.items():
        replace_text(path, text)
    return list(texts), table

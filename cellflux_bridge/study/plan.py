"""What a study consists of: the groups of every size, the trainings of generators, and the cells.

<output>/config.yaml                      the study
<output>/sizes/<size>/guide_rgb/          the classifier that guides, labels and selects, trained on the size's groups
<output>/sizes/<size>/<generator>/        a run: a flow or a reference bridge; made/ holds its trajectories
<output>/features/                        of held-out patches by frozen backbones
<output>/cells/<size>/<backbone>/<arm>/<seed>/   result.json, probabilities.npz; error.txt where it failed
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import safe_name
from cellflux_bridge.base.seeds import numpy_generator
from cellflux_bridge.base.walk import image_files
from cellflux_bridge.config import Config, load_config, merged, parse_overrides
from cellflux_bridge.data.index import Index, patch_index, remembered
from cellflux_bridge.data.layout.base import SPLITS
from cellflux_bridge.images import stat_of
from cellflux_bridge.study.settings import BackboneConfig, StudyConfig

GUIDE = "guide_rgb"
# Files in the folder of a guide or a generator: what it is made with, while it is made and when it is whole.
BEGUN, DONE = "begun.txt", "done.txt"
_PLACES = {"root", "without", "cache_dir", "workers"}
Size = int | str


class Making(NamedTuple):
    """The training of a generator on the groups of a size, and its translation of their patches."""

    size: Size
    generator: str


class Cell(NamedTuple):
    """One classifier: trained on the groups of a size with an arm's images and augmentation."""

    size: Size
    backbone: str
    arm: str
    seed: int


def makings(config: StudyConfig) -> list[Making]:
    """The generators that are trained: those that an arm uses."""
    used = {arm.images for arm in config.arms.values()}
    trained = [name for name, of in config.generators.items() if name in used and of.config is not None]
    return [Making(size, name) for size in config.sizes for name in trained]


def cells(config: StudyConfig) -> Iterator[Cell]:
    for size in config.sizes:
        for seed in range(config.seeds):  # so that early figures are of all arms
            for backbone in config.backbones:
                for arm in config.arms:
                    yield Cell(size, backbone, arm, seed)


def cell_folder(config: StudyConfig, cell: Cell) -> Path:
    return config.output / "cells" / Path(*(safe_name(str(part)) for part in cell))


def size_folder(config: StudyConfig, size: Size) -> Path:
    return config.output / "sizes" / safe_name(str(size))


def training_groups(config: StudyConfig, size: Size) -> list[str]:
    """The groups whose training patches a size has: of every class as many as it says, drawn by the seed, where a group
    that holds several classes counts for each. UserError for a class with fewer groups."""
    index = patch_index(config.data, seed=config.seed)
    names, chosen = [name.rpartition("\0")[2] for name in index.group_names], set()
    for number, label in enumerate(index.classes):
        rows = (index.splits == SPLITS.index("train")) & (index.labels == number)
        groups = [names[group] for group in np.unique(index.groups[rows])]
        order = numpy_generator(config.seed, "study groups", label).permutation(len(groups))
        drawn = [groups[i] for i in order]
        if size != "all" and len(groups) < size:
            raise UserError(
                f"sizes: {size} groups of every class, but class {label!r} has {len(groups)} training groups "
                "(patients, slides, tiles); name a smaller size, or 'all'"
            )
        more = None if size == "all" else max(0, size - len(chosen.intersection(groups)))
        chosen |= set([group for group in drawn if group not in chosen][:more])
    return sorted(chosen)


def sized(config: StudyConfig, size: Size) -> StudyConfig:
    """The study with the data of one size: its groups train, validation and test are whole."""
    index = patch_index(config.data, seed=config.seed)
    split = config.data.split.model_copy(update={"train_groups": training_groups(config, size)})
    data = config.data.model_copy(update={"split": split, "classes": list(index.classes)})
    return config.model_copy(update={"data": data})


def made_folder(config: StudyConfig, making: Making) -> Path:
    """Where the sequences of a generator are, a folder for each direction, numbered."""
    return size_folder(config, making.size) / safe_name(making.generator) / "made"


def guide_key(config: StudyConfig, size: Size) -> str:
    """What the guide of a size is made with, as text."""
    return json.dumps([_settings(guide_config(config, size)), _data_digest(config, size)], sort_keys=True)


def generator_key(config: StudyConfig, making: Making) -> str:
    """What the images of a generator are made with, as text; of a folder which files it holds."""
    of = config.generators[making.generator]
    if of.folder is not None:
        files = [(file.relative_to(of.folder).as_posix(), *stat_of(file)) for file in image_files(of.folder)]
        return json.dumps(files)
    parts = [_settings(generator_config(config, making)), of.kind, directions(config, making)]
    return json.dumps([*parts, guide_key(config, making.size)], sort_keys=True)


def _settings(config: Config) -> dict:
    """A configuration without places, and without what trains another part of the run."""
    ignore = ("name", "output", "video", *(f"data.{place}" for place in _PLACES), "translate.guidance.guides")
    return config.flat(without=ignore)


def _data_digest(config: StudyConfig, size: Size) -> str:
    """A hash of the patches of a size: files, labels, splits and groups."""
    index = patch_index(sized(config, size).data, seed=config.seed)

    def make() -> tuple[str, Index]:
        digest = hashlib.sha256(repr((index.ids, index.classes, index.group_names)).encode())
        stats = np.array([stat_of(index.file(number)) for number in range(len(index.ids))])
        for column in (index.labels, index.splits, index.groups, stats):
            digest.update(column.tobytes())
        return digest.hexdigest()[:16], index  # which is kept, so that its id is not another's

    return remembered(("study", id(index)), make)[0]


def guide_config(config: StudyConfig, size: Size) -> Config:
    """The configuration of the classifier of a size, which guides its flows, labels and selects; its run lies in
    <size>/guide_rgb."""
    own = config.model_dump(mode="json", include={"seed"}) | {"name": "guide", "output": size_folder(config, size)}
    given = merged(own, parse_overrides(config.guide))
    guide = merged(given, {"classifier": {"role": "guide", "sees": "image", "view": "rgb"}})
    return Config.model_validate({**guide, "data": sized(config, size).data.model_dump()})


def generator_config(config: StudyConfig, making: Making) -> Config:
    """The configuration of a generator's run: its own file with the study's data, seed, output and transitions and the
    size's groups and guide; it translates all training patches."""
    of, output = config.generators[making.generator], size_folder(config, making.size) / safe_name(making.generator)
    read = load_config(of.config, [*of.set, f"data.root={json.dumps(str(config.data.root))}"], output=output)
    pairs = directions(config, making)
    guidance = read.translate.guidance.model_copy(update={"guides": [size_folder(config, making.size) / GUIDE]})
    ends = dict(zip(("source", "target"), pairs[0], strict=True))
    translate = read.translate.model_copy(update={**ends, "split": "train", "num": None, "guidance": guidance})
    transitions = [pair for pair in pairs if pair[0] != pair[1]] if of.directions == "forward" else "all"
    read = read.model_copy(update={"pairs": read.pairs.model_copy(update={"transitions": transitions})})
    changes = {"data": sized(config, making.size).data, "seed": config.seed, "output": output, "translate": translate}
    return read.model_copy(update=changes | {"name": making.generator})


def backbone_files(backbone: BackboneConfig) -> list[tuple]:
    """The files of a backbone's local weights."""
    folder = backbone.weights
    return [(file.name, *stat_of(file)) for file in sorted(folder.iterdir())] if folder and folder.is_dir() else []


def feature_key(config: StudyConfig, cell: Cell) -> str:
    """The name of the features of held-out patches by a frozen backbone, which many cells share."""
    backbone, data = config.backbones[cell.backbone], config.data
    normalised = data.stain.mode == "normalise"  # the reference is that of a size's training patches
    parts = [backbone.model_dump(mode="json"), backbone_files(backbone), config.seed]
    parts += [
        data.model_dump(mode="json", exclude=_PLACES | {"split"}),
        _data_digest(config, cell.size if normalised else "all"),
    ]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{safe_name(cell.backbone, room=20)}-{key}"


def cell_digest(config: StudyConfig, cell: Cell) -> str:
    """A hash of all that a cell's result depends on, but for where things are; with another hash it is made anew."""
    arm, backbone = config.arms[cell.arm], config.backbones[cell.backbone]
    parts = {
        "seed": (config.seed, cell.seed),
        "data": sized(config, cell.size).data.model_dump(mode="json", exclude=_PLACES),
        "patches": _data_digest(config, cell.size),
        "arm": arm.model_dump(mode="json"),
        "backbone": (backbone.model_dump(mode="json"), backbone_files(backbone)),
        "train": config.train.model_dump(mode="json", exclude={"resume", "devices", "accelerator"}),
        "images": arm.images and generator_key(config, Making(cell.size, arm.images)),
        "guide": guide_key(config, cell.size) if arm.asks_guide else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def directions(config: StudyConfig, making: Making) -> list[tuple[str, str]]:
    """From which class to which a generator translates."""
    classes, kind = patch_index(config.data, seed=config.seed).classes, config.generators[making.generator].directions
    if kind == "forward":
        return [(classes[0], classes[-1])]
    pairs = [(a, b) for a in classes for b in classes if a != b]
    return pairs + ([(a, a) for a in classes] if kind == "all" else [])

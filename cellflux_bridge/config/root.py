"""One typed schema of a run: defaults, then the YAML file, then key.sub=value from the command line.

Every section is a pydantic model that refuses unknown keys. Components (layout, coupling, path, velocity) are
mappings with a `name`; their keys are the constructor's keyword arguments (see `registry`). A loaded `Config` is
complete: every default is filled in, so that the copy saved beside a result says all that it was made with.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.settings import ClassifierConfig
from cellflux_bridge.condition.settings import ConditionConfig
from cellflux_bridge.config.registry import component, trusting, trusts_everything
from cellflux_bridge.config.schema import ReceivedPath, Section, Seed, dump_yaml, explain, parse_yaml, read_yaml
from cellflux_bridge.data.settings import DataConfig, PairsConfig
from cellflux_bridge.ddim.settings import DDIMConfig
from cellflux_bridge.flow.settings import ShortcutConfig
from cellflux_bridge.perceptual.settings import PerceptualConfig
from cellflux_bridge.refiner.settings import RefinerConfig
from cellflux_bridge.training.settings import TrainConfig
from cellflux_bridge.translation.settings import TranslateConfig, without_foreign_keys
from cellflux_bridge.video.settings import VideoConfig

Coupling = component("coupling", "coupling", default="minibatch_ot")
Path_ = component("path", "path", default="noised_source")
Codec = component("codec", "codec", default="pixels")
Velocity = component("velocity", "velocity", default="unet")

# What may differ between the parts of one run: where things are, how long and how often, on which devices.
_PACE = (
    *("steps", "max_minutes", "max_cpu_minutes", "resume", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("validate_every", "sample_every", "tensorboard", "accelerator", "devices", "num_nodes", "strategy"),
)
_TRAININGS = ("train", "shortcut.train", "refiner.train", "classifier.train")
_TRAININGS += ("ddim.denoiser.train", "ddim.classifier.train")
PLACES_AND_PACE = (
    *("name", "output", "data.root", "data.without", "data.cache_dir", "data.workers"),
    *(f"{section}.{key}" for section in _TRAININGS for key in _PACE),
    # Of classifier.train they are more than a figure in the log: a guide of states has its temperatures from them.
    *(f"{section}.validate_pairs" for section in _TRAININGS if section != "classifier.train"),
)


class Root(Section):
    """What the configuration of every training has."""

    name: str
    seed: Seed = 0
    output: Path

    def to_yaml(self) -> str:
        """The complete configuration as YAML that `load_config` reads back to an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))

    def value(self, key: str) -> Any:
        """What stands at a dotted key, as in the YAML text; a section is a mapping. UserError where nothing does."""
        found = self.model_dump(mode="json")
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                raise UserError(f"{key}: no such key; `cellflux-bridge config show` prints all")
            found = found[part]
        return found

    def flat(self, *, of: Sequence[str] | None = None, without: Sequence[str] = ()) -> dict[str, Any]:
        """Every value by its dotted key: of some keys and sections of the root, or all, less those in `without`."""
        flat, waiting = {}, [("", self.model_dump(mode="json", include=None if of is None else set(of)))]
        while waiting:
            key, value = waiting.pop()
            if isinstance(value, dict):
                waiting += [(f"{key}.{name}".lstrip("."), item) for name, item in reversed(value.items())]
            elif not any(f"{key}.".startswith(f"{left_out}.") for left_out in without):
                flat[key] = value
        return flat


AnyRoot = TypeVar("AnyRoot", bound=Root)


class Config(Root):
    """The configuration of a flow, its classifiers and the reference bridge."""

    data: DataConfig
    pairs: PairsConfig = PairsConfig()
    coupling: Coupling
    path: Path_
    condition: ConditionConfig = ConditionConfig()
    codec: Codec
    velocity: Velocity
    train: TrainConfig = TrainConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    shortcut: ShortcutConfig = ShortcutConfig()
    refiner: RefinerConfig = Field(default_factory=RefinerConfig)
    classifier: ClassifierConfig = ClassifierConfig()
    ddim: DDIMConfig = DDIMConfig()
    translate: TranslateConfig = Field(default_factory=TranslateConfig)
    video: VideoConfig = VideoConfig()

    def digest(self) -> str:
        """A short hash of what sequences are made with: not where, how fast or how many, nor how they are shown."""
        # What networks learned, what refines, and shortcuts stand beside the digest by their weights.
        left_out = (*PLACES_AND_PACE, "video", "perceptual", "shortcut", "refiner", "classifier", "ddim")
        left_out += ("translate.num", "translate.batch_size")
        canonical = json.dumps(self.flat(without=left_out), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def merged(base: Any, over: Any, *, nested: bool = False) -> Any:
    """`base` with what `over` says otherwise, key by key at every depth."""
    if not isinstance(over, dict):
        return over
    if isinstance(base, str) and nested:
        base = {"name": base}
    if not isinstance(base, dict):
        return over
    if nested and "name" in base and over.get("name", base["name"]) != base["name"]:
        return over  # another component: the old one's arguments do not apply to it
    return {**base, **{key: merged(base.get(key), value, nested=True) for key, value in over.items()}}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested mapping that `key.sub=value` arguments describe; values are YAML."""
    together: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"{text!r}: expected key=value or key.sub=value, as in train.steps=2000")
        nested = parse_yaml(value, origin=f"command line, {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        together = merged(together, nested)
    return together


def split_overrides(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths, overrides) of what stands on a command line: an override is key.sub=value, and no file of that name."""
    overrides = [text for text in texts if re.match(r"[A-Za-z_][\w.]*=", text) and not Path(text).exists()]
    return [text for text in texts if text not in overrides], overrides


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    trust: bool | None = None,
    schema: type[AnyRoot] = Config,
) -> AnyRoot:
    """The complete configuration of a YAML file with `key.sub=value` overrides, of the kind `schema`.

    `name` defaults to the file's own name and `output` to `runs/<name>`; the argument `output`, where a run was found,
    replaces what its file says. `trust` says whether `name: package.module:Class` in the file may import that module.
    By default it may, except in a config.yaml: that of a run, a checkpoint or a trajectory, which may come from
    somebody else. At the data.root and data.cache_dir of such a file nothing is made, either: see `ReceivedPath`.
    Overrides are the user's own and always trusted. Raises UserError that lists every unknown key (with the nearest
    valid one) and every wrong value.
    """
    path = Path(path)
    data = read_yaml(path) | ({} if output is None else {"output": output})
    given = parse_overrides(overrides)
    section, over = data.get("translate"), given.get("translate")
    if isinstance(section, dict) and isinstance(over, dict):
        data["translate"] = without_foreign_keys(section, over)
    data = merged(data, given)
    data.setdefault("name", path.stem)
    data.setdefault("output", f"runs/{data['name']}")
    named = re.findall(r"(?<![\w.-])[\w.-]+:[\w./-]+", " ".join(overrides))
    try:
        with trusting(path.name != "config.yaml" if trust is None else trust, names=named):
            config, received = schema.model_validate(data), not trusts_everything()
    except ValidationError as error:
        shown = f" with {' '.join(overrides)}" if overrides else ""
        raise UserError(f"{path}{shown}:\n{explain(error, schema)}") from error
    if not isinstance(config, Config):
        return config
    keys = [key for key in ("root", "cache_dir") if received and key not in given.get("data", {})]
    places = {key: ReceivedPath(getattr(config.data, key)) for key in keys}
    return config.model_copy(update={"data": config.data.model_copy(update=places)})

"""The check that sequences and the classifiers that judge them come from the same patches."""

import json
from collections.abc import Sequence
from pathlib import Path

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import Config, load_config, parse_overrides


def require_same_data(folders: Sequence[Path], runs: Sequence[Path], overrides: Sequence[str]) -> None:
    """UserError if the config.yaml of a trajectory folder names another data.root or data.layout than a classifier's
    run, whose real patches the frames would be compared with. A key in `overrides` is not checked, nor are frames
    without a configuration."""
    given = parse_overrides(overrides).get("data", {})
    for folder in folders:
        if not (folder / checkpoint.CONFIG).exists():
            continue
        theirs = load_config(folder / checkpoint.CONFIG)
        for run in runs:
            ours = checkpoint.read_config(checkpoint.latest(run))
            for key in ("root", "layout"):
                if key not in given and _place(theirs, key) != _place(ours, key):
                    found = (config.value(f"data.{key}") for config in (theirs, ours))
                    there, here = (value if isinstance(value, str) else json.dumps(value) for value in found)
                    raise UserError(
                        f"{folder}: was made from data.{key}={there}, but {run} would compare it with real patches of "
                        f"data.{key}={here}; say which are meant: data.{key}={there} or data.{key}={here}"
                    )


def _place(config: Config, key: str):
    if key == "root":
        return config.data.root.expanduser().resolve()
    # Which classes are left out is no other place: an extractor may have learned more of them than are compared.
    return {name: value for name, value in config.value("data.layout").items() if name != "ignore"}

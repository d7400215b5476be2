"""Text files that appear whole or not at all, and what may stand in them."""

import math
import os
from pathlib import Path
from typing import Any

from cellflux_bridge.base.errors import UserError


def require_json(output: Path) -> None:
    """UserError for an --output that cannot be a JSON file; to be asked before the work that leads to it, too."""
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"--output {output}: expected a file name that ends in .json; tables are written beside it")


def replace_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, then rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def without_nan(value: Any) -> Any:
    """A value for JSON, with None for each number that is not finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Text files that appear whole or not at all, what may stand in them, and safe names for them."""

import csv
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable
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


def safe_name(text: str, *, room: int = 0) -> str:
    """One path component for any text (a label, an id): at most 255 bytes with `room` bytes that will follow it.

    Letters, digits and . _ - stay; anything else becomes _, and a name that starts with a dot gets _ before it. A text
    that had to be changed or cut ends in a short hash of it, so that two texts never share a name.
    """
    kept = re.sub(r"[^\w.-]+", "_", text).strip()
    kept = f"_{kept}" if kept.startswith(".") or not kept else kept
    mark = f"-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    most = 255 - room
    if kept == text and len(kept.encode()) <= most:
        return kept
    return kept.encode()[: most - len(mark)].decode(errors="ignore") + mark


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV, None as an empty cell. A text that looks like a formula gets a ' in front."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `csv_text` made, each by its columns, with the texts that were written."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: cell[1:] if cell and _inert(cell[1:]) == cell else cell for key, cell in row.items()} for row in rows]


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell

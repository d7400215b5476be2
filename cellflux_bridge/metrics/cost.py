"""The cost of making sequences, which `translate` writes into cost.json of their folder."""

import json
from pathlib import Path
from typing import NamedTuple

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular

COST = "cost.json"


class Cost(NamedTuple):
    """Seconds by the clock a sequence on a `device` ("cpu", "cuda: NAME"); of a CPU, its seconds too."""

    device: str
    seconds: float
    cpu_seconds: float | None


def read_cost(folder: Path) -> Cost | None:
    """The cost of a trajectory folder's sequences; None without its file, UserError for a damaged one.

    A file that names no device is of the CPU.
    """
    path = folder / COST
    if not path.exists():
        return None
    try:
        cost = json.loads(regular(path).read_text(encoding="utf-8"))
        num, device = int(cost["sequences"]), str(cost.get("device", "cpu"))
        cpu_seconds = float(cost["cpu_seconds"]) / num if device == "cpu" else None
        return Cost(device, float(cost["seconds"]) / num, cpu_seconds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path}: expected sequences, seconds and, of a CPU, cpu_seconds ({error!r}); remove it: only the time a "
            "sequence took is then unknown"
        ) from error

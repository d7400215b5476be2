"""How far the built-in network miscounts: its error on label maps of tissue that it was not trained on.

Random errors of single images average out in a curve; a bias of the counter on a kind of tissue does not. So the error
of a mean is the root mean square, over kinds of tissue, of (found - true) / true over all nuclei, or all nuclear area,
of that kind. It depends on how many pixels a nucleus has: `weights/counter_error.json` holds it by nuclear diameter,
measured by networks that had not seen the kind in question (docs/cellularity.md has the commands).
"""

import json
from functools import lru_cache

import numpy as np

from cellflux_bridge.cellularity.network import BUILT_IN
from cellflux_bridge.cellularity.parameters import Parameters

FILE = BUILT_IN.with_name("counter_error.json")
# Of which measured quantity the others have the error.
_LIKE = {"count": "count", "density_mm2": "count", "area_fraction": "area_fraction"}


@lru_cache(maxsize=1)
def _measured() -> dict[str, list[float]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def relative_errors(parameters: Parameters, median_area: float) -> dict[str, float]:
    """The relative standard error by quantity of means over images whose nuclei have that median area in px.

    Empty where it was not measured: for other methods and networks, and without nuclei.
    """
    if parameters.method != "network" or parameters.model or not median_area > 0:
        return {}
    measured, diameter = _measured(), 2 * np.sqrt(median_area / np.pi)
    at = np.log(diameter), np.log(measured["diameter"])
    return {name: float(np.interp(*at, measured[like])) for name, like in _LIKE.items()}

"""Published data sets, each from its own download to a manifest.csv.

An entry is one file of this folder that holds a `DATASET = Published(...)`. It is found by its file's name.
"""

import importlib
import pkgutil

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.data.published.base import Published


def names() -> list[str]:
    """The names of all entries."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(name: str) -> Published:
    """The entry of a name, in which - stands for _, too. UserError, which lists them all, where there is none."""
    wanted = name.replace("-", "_").casefold()
    if wanted not in (known := names()):
        raise UserError(f"no published data set called {name!r}{nearest(wanted, known)}; known:\n{listing()}")
    return importlib.import_module(f"{__name__}.{wanted}").DATASET


def listing() -> str:
    """A line for every entry."""
    return "\n".join(f"  {name:16} {find(name).title}" for name in names())

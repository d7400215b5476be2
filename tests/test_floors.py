"""The house stands: a module imports only from lower floors or from its own room, and scripts hold no logic."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "cellflux_bridge"
# The network that finds nuclei: a training may look through it, too.
FINDING = ("network", "finding", "fields", "label_maps", "parameters", "maps")
# What stands on each floor: rooms (folders), single files, and files that stand higher or lower than their room does.
FLOORS = (
    {"base", "config", "images", "trajectory", "video", "errors", "stain"},
    {"data", "coupling", "path", "condition", "codec"},
    {"velocity", "field", "checkpoint"},
    {"transport", "classifier", "ddim", *(f"cellularity.{name}" for name in FINDING)},
    {"training", "perceptual"},
    {"classifier.task", "classifier.scores", "ddim.task"},
    {"flow", "refiner"},
    {"translation", "metrics", "cellularity", "augmentation"},
    {"study", "report"},
    {"api", "cli", "translator", "__main__"},
)
# A room's settings are read by the configuration's root, so they stand on the ground and import nothing but it.
SETTINGS = "settings"
MODULES = sorted(path for path in (ROOT / PACKAGE).rglob("*.py") if path != ROOT / PACKAGE / "__init__.py")
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SCRIPTS = sorted(path for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def imported(source: str, *, package: tuple[str, ...]) -> set[str]:
    """Modules of this package, as dotted names below it, that a module's text imports, wherever the import stands;
    `package` is where it lies. Of `from x import y` both x and x.y, since y may be a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = [*start, *(node.module.split(".") if node.module else ())]
            names = [[*base, alias.name] for alias in node.names]
        found |= {".".join(parts[1:]) for parts in names if parts[0] == PACKAGE and len(parts) > 1}
    return found - {"__version__"}


def floor_of(name: str) -> int | None:
    """The floor of a module, or of a name in one: that of the longest beginning which stands in FLOORS."""
    parts = name.split(".")
    if SETTINGS in parts:
        return 0
    known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((FLOOR[prefix] for prefix in known if prefix in FLOOR), None)


def test_imports_are_found_wherever_and_however_they_are_written():
    source = "\n".join(
        [
            "import cellflux_bridge.data.pairs as p, os",
            "from cellflux_bridge import images, stain",
            "def f():",
            "    from cellflux_bridge.path.base import Path",
            "    from . import sibling",
            "    from ..coupling import base",
            "    from .. import video",
        ]
    )
    expected = {"data.pairs", "images", "stain", "path.base.Path", "training.sibling", "coupling.base", "video"}
    assert imported(source, package=(PACKAGE, "training")) == expected


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_a_module_imports_only_from_lower_floors_or_its_own_room(path):
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    own = floor_of(".".join(parts))
    assert own is not None, f"{parts[0]} is a new room: name its floor in FLOORS"
    for name in imported(path.read_text(encoding="utf-8"), package=(PACKAGE, *parts[:-1])):
        floor, sibling = floor_of(name), own == 0 or own == len(FLOORS) - 1 or name.split(".")[0] == parts[0]
        assert floor is not None, f"{name}: no such room"
        assert floor < own or (sibling and floor == own), f"{'.'.join(parts)} (floor {own}) imports {name} ({floor})"


def test_every_name_in_the_floors_is_there():
    for name in FLOOR.keys() - {"__main__"}:
        place = ROOT / PACKAGE / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), name


def test_scripts_define_nothing():
    for path in SCRIPTS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        defined = [
            node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]
        assert not defined, f"{path} defines {defined}; its logic belongs into {PACKAGE}/"

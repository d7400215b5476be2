"""The house stands: a module imports only from lower floors or from its own room, and scripts hold no logic."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "cellflux_bridge"
# Above the ground, on which every other module of the package's own folder stands.
FLOORS = (
    {"data", "coupling", "path", "velocity"},
    {"guidance", "classifier", "transport", "bridge"},
    {"training"},
    {"metrics", "cellularity", "augmentation", "video"},
    {"study"},
    {"report", "translator", "guides", "pilot", "api", "reference", "cli", "__main__"},
)
MODULES = sorted(path for path in (ROOT / PACKAGE).rglob("*.py") if path != ROOT / PACKAGE / "__init__.py")
GROUND = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - set.union({"__init__"}, *FLOORS)
FLOOR = {room: number for number, rooms in enumerate((GROUND, *FLOORS)) for room in rooms}
SCRIPTS = sorted(path for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def imported_rooms(source: str, *, package: tuple[str, ...]) -> set[str]:
    """Rooms of this package that a module's text imports, wherever the import stands; `package` is where it lies."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = [*start, *(node.module.split(".") if node.module else ())]
            found = [[*base, alias.name] for alias in node.names]
        rooms |= {parts[1] for parts in found if parts[0] == PACKAGE and len(parts) > 1}
    return rooms


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT / PACKAGE).parts[0]
    return first.removesuffix(".py")


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
    package = (PACKAGE, "training")
    expected = {"data", "images", "stain", "path", "training", "coupling", "video"}
    assert imported_rooms(source, package=package) == expected


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_a_module_imports_only_from_lower_floors_or_its_own_room(path):
    room = room_of(path)
    assert room in FLOOR, f"{room} is a new room: name its floor in FLOORS"
    package = (PACKAGE, *path.relative_to(ROOT / PACKAGE).parts[:-1])
    # The lowest and the top floor are one room each: modules of the package's own folder.
    own = next((floor for floor in (GROUND, FLOORS[-1]) if room in floor), {room})
    names = imported_rooms(path.read_text(encoding="utf-8"), package=package) - own - {"__version__"}
    assert not {name for name in names if FLOOR.get(name, len(FLOORS)) >= FLOOR[room]}


def test_the_rooms_that_all_others_stand_on_are_there():
    assert {room_of(path) for path in MODULES} >= {"errors", "config", "images", "trajectory"} | FLOORS[0]


def test_scripts_define_nothing():
    for path in SCRIPTS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        defined = [
            node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]
        assert not defined, f"{path} defines {defined}; its logic belongs into {PACKAGE}/"

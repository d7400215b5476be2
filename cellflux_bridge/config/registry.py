"""Components by name: one file in a folder is one component, and its constructor's signature is its YAML schema.

`coupling: {name: minibatch_ot, cost: pixels}` finds the class `MinibatchOT` in `coupling/minibatch_ot.py` (it is named
like the file, without underscores, whatever the case). `name: my_pkg.my_mod:MyCoupling` finds a class of the user's
own. Keyword-only parameters of the constructor may stand in the YAML; the program provides positional ones (the number
of classes, for instance).

A component is a subclass of its kind's base, the class in `<folder>/base.py` that is named like the kind. A foreign
module is imported, which runs it, only where the configuration is trusted (see `trusting`).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import Keys, explain, nearest

# What a YAML key may choose -> the folder whose files are the choices.
KINDS = {
    "layout": "cellflux_bridge.data.layout",
    "coupling": "cellflux_bridge.coupling",
    "path": "cellflux_bridge.path",
    "part": "cellflux_bridge.condition",
    "codec": "cellflux_bridge.codec",
    "velocity": "cellflux_bridge.velocity",
    "transport": "cellflux_bridge.transport",
    "augmentation": "cellflux_bridge.augmentation",
}
_NOT_COMPONENTS = {"base", "settings", "integrate"}

# Whether every foreign class is trusted here, and the names of those that the user named.
_trust: ContextVar[tuple[bool, set[str]]] = ContextVar("trust")


@contextmanager
def trusting(everything: bool = True, *, names: Iterable[str] = ()) -> Iterator[None]:
    """A block in which configurations may name foreign classes (`package.module:Class`), which are then imported.

    With `everything` any of them, otherwise those in `names`. A name that is accepted in a block inside stays accepted
    until the end of the outer block: what the user's own YAML names is also accepted in the run made from it.
    """
    outer, known = _trust.get((False, set()))
    known.update(names)
    token = _trust.set((everything or outer, known))
    try:
        yield
    finally:
        _trust.reset(token)


def trusts_everything() -> bool:
    """Whether this code runs in a block that trusts every configuration."""
    return _trust.get((False, set()))[0]


def require_trusted(name: str, *, key: str, what: str, not_done: str) -> None:
    """UserError outside a block of `trusting` this name."""
    everything, known = _trust.get((False, set()))
    if not everything and name not in known:
        raise UserError(
            f"{key}: {name!r} is {what}, named by a configuration that may come from somebody else, so it was not "
            f"{not_done}. If you trust it, pass --trust (in Python trust=True)"
        )
    known.add(name)


def names(kind: str) -> list[str]:
    """Short names of the components of a kind, read off the folder's files."""
    package = importlib.import_module(KINDS[kind])
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if name not in _NOT_COMPONENTS and not name.startswith("_"))


def _named_like(module: str, name: str) -> type:
    classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return {key.lower(): value for key, value in classes}[name.replace("_", "")]


def _class(kind: str, name: str, *, key: str) -> type:
    """The class that `name` means; `key` is where it stands in the configuration, for the error.

    Raises UserError for an unknown name, and for a class that is not derived from the kind's base.
    """
    if ":" in name:
        return _foreign_class(kind, name, key=key)
    known = names(kind)
    if name not in known:
        raise UserError(
            f"{key}.name: no {kind} called {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
            "or package.module:Class of your own"
        )
    return _named_like(f"{KINDS[kind]}.{name}", name)


def _foreign_class(kind: str, name: str, *, key: str) -> type:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"{key}.name: cannot import {name!r} ({error}); expected package.module:Class") from error
    base = _named_like(f"{KINDS[kind]}.base", kind)
    if not inspect.isclass(found) or not issubclass(found, base):
        expected = f"{base.__module__}:{base.__name__}"
        raise UserError(f"{key}.name: {name!r} is no {kind}; expected a class derived from {expected}")
    if found is base or inspect.isabstract(found):
        raise UserError(f"{key}.name: {name!r} is abstract; expected a class that has all methods of a {kind}")
    return found


@cache
def _schema(cls: type) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls.__init__, eval_str=True).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            required = parameter.default is parameter.empty
            fields[parameter.name] = (annotation, ... if required else parameter.default)
    return create_model(cls.__name__, __base__=Keys, **fields)


def validate(kind: str, spec: Mapping[str, Any] | str, *, key: str) -> dict[str, Any]:
    """The complete spec (name and every argument, defaults filled in) of a component as written in a configuration.

    A foreign class is imported only inside a block of `trusting`; UserError otherwise, and for wrong arguments.
    """
    arguments = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(arguments, Mapping):
        raise UserError(f"{key}: expected a name or a mapping with a name, found {spec!r}")
    arguments = dict(arguments)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{key}.name: expected one of {', '.join(names(kind))}, found {name!r}")
    if ":" in name:
        require_trusted(name, key=f"{key}.name", what="code outside this package", not_done="run")
    schema = _schema(_class(kind, name, key=key))
    try:
        return {"name": name, **schema.model_validate(arguments).model_dump(mode="python")}
    except ValidationError as error:
        raise UserError(explain(error, schema, prefix=key, note=f"arguments of {kind} {name!r}")) from error


def component(kind: str, key: str, *, default: str, **arguments: Any) -> Any:
    """The type of a configuration's key that chooses a component; `arguments` are what the default one has here where
    they are not given, whatever its constructor says."""

    def complete(spec: Any) -> dict[str, Any]:
        spec = {"name": default, **spec} if isinstance(spec, dict) else spec
        if arguments and isinstance(spec, dict) and spec["name"] == default:
            spec = {**arguments, **spec}
        return validate(kind, spec, key=key)

    return Annotated[dict[str, Any], BeforeValidator(complete), Field(default_factory=dict)]


def build(kind: str, spec: Mapping[str, Any], *provided: Any) -> Any:
    """An instance of the component that a `spec` from `validate` describes; `provided` are positional arguments."""
    arguments = dict(spec)
    return _class(kind, arguments.pop("name"), key=kind)(*provided, **arguments)

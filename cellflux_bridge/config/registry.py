"""Components by name: one file in a folder is one component, and its constructor's signature is its YAML schema.

`coupling: {name: minibatch_ot, cost: pixels}` finds the class `MinibatchOT` in `coupling/minibatch_ot.py` (the class
whose name is the file's, without underscores, whatever its case). `name: my_pkg.my_mod:MyCoupling` finds a
class of the user's own. Keyword-only parameters of the constructor may stand in the YAML; positional ones are
provided by the program (the number of classes, for instance).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import Keys, explain, nearest

# What a YAML key may choose -> the folder whose files are the choices.
KINDS = {
    "layout": "cellflux_bridge.data.layout",
    "coupling": "cellflux_bridge.coupling",
    "path": "cellflux_bridge.path",
    "condition": "cellflux_bridge.condition",
    "codec": "cellflux_bridge.codec",
    "velocity": "cellflux_bridge.velocity",
}
_NOT_COMPONENTS = {"base", "settings"}


def names(kind: str) -> list[str]:
    """Short names of the components of a kind, read off the folder's files."""
    package = importlib.import_module(KINDS[kind])
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if name not in _NOT_COMPONENTS and not name.startswith("_"))


def component_class(kind: str, name: str, *, key: str) -> type:
    """The class that `name` means; `key` is where it stands in the configuration, for the error."""
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"{key}.name: cannot import {name!r} ({error}); expected package.module:Class") from error
        if not inspect.isclass(found):
            raise UserError(f"{key}.name: {name!r} is no class; expected package.module:Class")
        return found
    known = names(kind)
    if name not in known:
        raise UserError(
            f"{key}.name: no {kind} called {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
            "or package.module:Class of your own"
        )
    module = importlib.import_module(f"{KINDS[kind]}.{name}")
    wanted = name.replace("_", "")
    for attribute, value in vars(module).items():
        if inspect.isclass(value) and attribute.lower() == wanted:
            return value
    raise AssertionError(f"{module.__file__} holds no class named like the file")


def _schema(cls: type) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls.__init__, eval_str=True).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            required = parameter.default is parameter.empty
            fields[parameter.name] = (annotation, ... if required else parameter.default)
    return create_model(cls.__name__, __base__=Keys, **fields)


def validate(kind: str, spec: Mapping[str, Any] | str, *, key: str) -> dict[str, Any]:
    """The complete spec (name and every argument, defaults filled in) of a component as written in a configuration."""
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise UserError(f"{key}: expected a name or a mapping with a name, found {spec!r}")
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        found = "missing" if name is None else f"{name!r} is no text"
        raise UserError(f"{key}.name: {found}; expected one of {', '.join(names(kind))}")
    schema = _schema(component_class(kind, name, key=key))
    try:
        return {"name": name, **schema.model_validate(arguments).model_dump(mode="python")}
    except ValidationError as error:
        raise UserError(explain(error, schema, prefix=key, note=f"arguments of {kind} {name!r}")) from error


def component(kind: str, key: str, *, default: str) -> Any:
    """The type of a configuration's key that chooses a component."""

    def complete(spec: Any) -> dict[str, Any]:
        spec = {"name": default, **spec} if isinstance(spec, dict) else spec
        return validate(kind, spec, key=key)

    return Annotated[dict[str, Any], BeforeValidator(complete), Field(default_factory=dict)]


def build(kind: str, spec: Mapping[str, Any], *provided: Any, key: str | None = None) -> Any:
    """An instance of the component that a validated `spec` describes, `provided` being its positional arguments."""
    arguments = dict(spec)
    cls = component_class(kind, arguments.pop("name"), key=key or kind)
    return cls(*provided, **arguments)

"""Reading YAML and explaining what is wrong with a value, in words that name the key and the nearest valid one."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cellflux_bridge.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as its users mean it: 1e-4 is a number, `no` is a word, and a key stands once in a mapping."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {key for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {sorted(map(str, repeated))[0]!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-4 is a string and yes/no/on/off are booleans; these are the 1.2 rules.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, origin: str) -> Any:
    """The value of a YAML text; `origin` names where it stands, for the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this configuration ({error})") from error
    data = parse_yaml(text, origin=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _model_at(model: type[BaseModel], loc: tuple) -> type[BaseModel] | None:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def explain(error: ValidationError, model: type[BaseModel], *, prefix: str = "", note: str = "") -> str:
    """What a pydantic error means, a line a problem: key, what was found, what was expected, the nearest valid key."""
    lines = []
    for problem in error.errors():
        loc = problem["loc"]
        key = ".".join([prefix, *map(str, loc)] if prefix else map(str, loc))
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            lines.append(str(cause))
        elif problem["type"] == "extra_forbidden":
            at = _model_at(model, loc[:-1])
            valid = list(at.model_fields) if at else []
            parent = key.rpartition(".")[0]
            hint = nearest(str(loc[-1]), valid)
            hint = hint.replace("mean '", f"mean '{parent}.") if parent else hint
            lines.append(f"{key}: unknown key{hint}; valid here: {', '.join(valid) or 'none'}")
        else:
            found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message[:1].lower()}{message[1:]}{found}")
    return "\n".join(lines) + (f"\n({note})" if note else "")

"""Reading YAML and explaining what is wrong with a value, in words that name the key and the nearest valid one."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import regular


class ReceivedPath(type(Path())):
    """A path that somebody else's configuration names: what is there is read, and nothing is made there."""


# No setting means more. What a machine cannot hold is found out later; what overflows its numbers is refused here.
MOST = 2**32 - 1


class Keys(BaseModel):
    """A mapping whose keys are known: anything else is refused, and so is true or false for a number, and a number
    beyond 4 billion."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            types = re.findall(r"\w+", str(cls.model_fields[info.field_name].annotation))
            if "bool" not in types and ("int" in types or "float" in types):
                raise ValueError("expected a number")
        elif isinstance(value, int | float) and abs(value) > MOST:
            raise ValueError(f"expected a number of at most {MOST:,}")
        return value


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
# Of what is held at once, or drawn for one update.
Few = Annotated[int, Field(ge=1, le=100_000)]
Seed = Annotated[int, Field(ge=0, le=MOST)]
# Of a network's layers and levels: their number alone takes memory, before there is a weight to weigh.
Blocks = Annotated[int, Field(ge=1, le=128)]
FewLevels = Field(min_length=1, max_length=16)
NonNegative = Annotated[float, Field(ge=0)]


class Section(Keys):
    model_config = ConfigDict(validate_default=True, frozen=True)


# A complete configuration has 10 kB. Longer texts are none, and a few dozen aliases of aliases can stand for billions
# of values: neither is worked through.
_MOST_BYTES, _MOST_ALIASES = 1_000_000, 30
_MOST_TOLD = 20  # problems of one configuration


class _Loader(yaml.SafeLoader):
    """YAML as its users mean it: 1e-4 is a number, `no` is a word, and a key stands once in a mapping."""

    def __init__(self, text: str):
        super().__init__(text)
        self._complete, self._num_aliases = set(), 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._num_aliases += 1
            if self._num_aliases > _MOST_ALIASES:
                raise yaml.composer.ComposerError(None, None, f"more than {_MOST_ALIASES} aliases", event.start_mark)
            if event.anchor in self.anchors and event.anchor not in self._complete:
                raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", event.start_mark)
        node = super().compose_node(parent, index)
        self._complete.add(event.anchor)
        return node

    def compose_mapping_node(self, anchor):
        # Before `<<` is resolved: a key that overrides a merged one stands once.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every word that either YAML 1.1 or `_Loader` would read as something else."""


# PyYAML follows YAML 1.1, where 1e-4 is a string and yes/no/on/off are booleans; these are the 1.2 rules.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, *, origin: str) -> Any:
    """The value of a YAML text; `origin` names where it stands, for the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # besides YAMLError, constructors stumble over foreign tags and values in many ways
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{origin}: not valid YAML: {reason}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        received = path.name == "config.yaml"  # one's own may come through a pipe of the shell
        with open(regular(path) if received else path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this configuration ({error})") from error
    if len(text) > _MOST_BYTES:
        raise UserError(f"{path}: longer than {_MOST_BYTES:,} characters; expected a configuration in YAML")
    data = parse_yaml(text, origin=str(path))
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data or {}


def dump_yaml(data: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal value."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _locate(model: type[BaseModel], loc: tuple) -> tuple[list[str], type[BaseModel] | None]:
    """The keys that pydantic's `loc` names, without the members of unions it went through, and the innermost model
    that they stand in."""
    keys, at, inside = [], model, model
    for part in loc:
        if inside is not None or isinstance(part, int):
            keys.append(str(part))
        at = inside or at
        field = inside.model_fields.get(part) if inside else None
        annotation = field.annotation if field else None
        inside = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return keys, at


def explain(error: ValidationError, model: type[BaseModel], *, prefix: str = "", note: str = "") -> str:
    """What a pydantic error means, a line a problem: key, what was found, what was expected, the nearest valid key."""
    lines: dict[str, dict[str, bool]] = {}  # of each key what is said, and whether that is but another type's name
    outer = set()  # keys inside which a problem is
    for problem in error.errors():
        keys, at = _locate(model, problem["loc"])
        *parents, last = keys = [prefix, *keys] if prefix else keys or [""]
        key = ".".join(keys)
        outer.update(".".join(keys[:depth]) for depth in range(1, len(keys)))
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            text = str(cause)
        elif problem["type"] == "extra_forbidden":
            hint = nearest(last, at.model_fields).replace("mean '", "mean '" + "".join(f"{key}." for key in parents))
            text = f"{key}: unknown key{hint}; valid here: {', '.join(at.model_fields) or 'none'}"
        else:
            found = "" if problem["type"] == "missing" else f", found {problem['input']!r:.200}"
            message = problem["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
            text = f"{key}: {message[:1].lower()}{message[1:]}{found}"
        lines.setdefault(key, {})[text] = problem["type"].endswith(("_type", "_parsing", "literal_error"))
    told = [text for key, texts in lines.items() for text in _of_union(key, texts, is_outer=key in outer)]
    more = [f"and {len(told) - _MOST_TOLD} more"] if len(told) > _MOST_TOLD else []
    return "\n".join(told[:_MOST_TOLD] + more) + (f"\n({note})" if note else "")


def _of_union(key: str, texts: dict[str, bool], *, is_outer: bool) -> list[str]:
    """One line for a key whose type is a union: each of its members says what is wrong, but only the member that the
    value was meant for says more than that it is another type."""
    if apt := [text for text, is_type in texts.items() if not is_type]:
        return apt
    if is_outer:
        return []
    *others, last = texts
    first, *more = [*(text.partition(", found")[0] for text in others), last]
    return [" or ".join([first, *(text.removeprefix(f"{key}: input should be ") for text in more)])]

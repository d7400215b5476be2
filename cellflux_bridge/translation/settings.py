"""What is translated, and how."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import registry
from cellflux_bridge.config.schema import Count, Few, NonNegative, Section, nearest
from cellflux_bridge.field.settings import GuidanceConfig

Positive = Annotated[float, Field(gt=0, le=1e12)]


def method_keys(method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every key of a transport method with its value in `given`, or its default; UserError for wrong values."""
    spec = registry.validate("transport", {**(given or {}), "name": method}, key="translate")
    return {key: value for key, value in spec.items() if key != "name"}


def _known_keys(*methods: str) -> dict[str, None]:
    of_methods = (key for name in (*registry.names("transport"), *methods) for key in method_keys(name))
    return dict.fromkeys([*TranslateConfig.model_fields, *of_methods])


def without_foreign_keys(section: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A section `translate` as it stands under another method: the keys of a foreign method go with it."""
    method = str(section.get("method"))
    if ":" not in method or over.get("method", method) == method:
        return section
    known = _known_keys()
    return {key: value for key, value in section.items() if key in known}


class TranslateConfig(Section):
    """Keys that all methods share. Those of the chosen method (steps, solver, levels, ...) stand beside them, complete;
    keys of other methods may stand here, too, since a file serves many uses (see the classes in `transport`)."""

    model_config = ConfigDict(extra="allow")

    source: str | None = None
    target: str | None = None
    split: Literal["train", "val", "test"] = "test"
    num: Count | None = 64
    method: str = "path"
    guidance_scale: NonNegative = 1.0
    # Of networks that are conditioned on a dose: that of the target, or those of the first and the last level of a
    # stair along doses, between which the logarithm rises evenly; null: not known.
    dose: Positive | tuple[Positive, Positive] | None = None
    guidance: GuidanceConfig = GuidanceConfig()
    refine: bool = True  # by the refiner of a flow's run, where it has one
    batch_size: Few = 64  # images that go through the network at once

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        method, known = data.get("method", "path"), registry.names("transport")
        if not isinstance(method, str) or (":" not in method and method not in known):
            way = f"{nearest(str(method), known)}; known: {', '.join(known)}, or package.module:Class of your own"
            if method == "ddim":
                way = " of a flow; train the reference bridge with `cellflux-bridge train-ddim` and translate its run"
            raise UserError(f"translate.method: no method called {method!r}{way}")
        valid = _known_keys(method)
        if unknown := [key for key in data if key not in valid]:
            hints = [nearest(key, valid).replace("mean '", "mean 'translate.") for key in unknown]
            lines = [f"translate.{key}: unknown key{hint}" for key, hint in zip(unknown, hints, strict=True)]
            raise UserError("\n".join(f"{line}; valid here: {', '.join(valid)}" for line in lines))
        complete = {key: value for key, value in data.items() if key in cls.model_fields}
        for name in dict.fromkeys((method, *known)):  # the chosen method tells its faults first
            found = method_keys(name, {key: data[key] for key in method_keys(name) if key in data})
            complete = {key: value for key, value in found.items() if name == method or key in data} | complete
        return complete

    def of(self, method: str) -> dict[str, Any]:
        """The complete keys of any method: those that stand here, and its defaults."""
        with registry.trusting(False, names=[self.method]):  # it was trusted when these settings were made
            given = {key: self.model_extra[key] for key in method_keys(method) if key in self.model_extra}
            return method_keys(method, given)

    def own(self) -> "TranslateConfig":
        """The same settings without the keys of other methods."""
        common = {key: getattr(self, key) for key in type(self).model_fields}
        with registry.trusting(False, names=[self.method]):
            return type(self)(**common, **self.of(self.method))

"""What a velocity network is conditioned on, beside time and state."""

from typing import Any, Literal

from pydantic import Field, field_validator

from cellflux_bridge.config.registry import validate
from cellflux_bridge.config.schema import Few, Fraction, Section


class ConditionConfig(Section):
    """The parts of the condition: the target as a class or a level, and what else the network knows."""

    target: Literal["class", "level", "none"] = "class"  # none: further parts say it
    # What the level of a training image is, where target is "level": its score in the data, what classifiers say of it
    # that were not trained on its group (cross-fitting; a quarter of a class lies beyond its end), or its class alone.
    level: Literal["score", "crossfit", "class"] = "class"
    level_bins: Few = 4
    source_class: bool = True
    source_image: bool = False
    parts: list[dict[str, Any]] = Field(default=[])  # further ones, each a component of the kind `part`
    dropout: Fraction = 0.1

    @field_validator("parts", mode="before")
    @classmethod
    def _complete(cls, parts: Any) -> Any:
        if not isinstance(parts, list):
            raise ValueError("expected a list of names, or of mappings with a name")
        found = [validate("part", part, key=f"condition.parts.{i}") for i, part in enumerate(parts)]
        names = ["target_class", "level", "source_class", "source_image", *(part["name"] for part in found)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice, or has a key of its own (target, source_class, source_image)")
        return found

    def all_parts(self) -> list[dict[str, Any]]:
        """Every part as a component, in the order in which networks build their embeddings."""
        named = {
            "target_class": self.target == "class",
            "level": self.target == "level",
            "source_class": self.source_class,
            "source_image": self.source_image,
        }
        return [*({"name": name} for name, is_used in named.items() if is_used), *self.parts]

    def has(self, part: str) -> bool:
        return any(found["name"] == part for found in self.all_parts())

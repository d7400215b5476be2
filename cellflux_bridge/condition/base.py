"""What a velocity network is conditioned on: named tensors, and the parts that read and embed them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from cellflux_bridge.base.errors import UserError


class Condition:
    """The condition of B samples: one tensor (B, ...) for each part, by the part's name, as `Condition(level=...)`.

    `cond.level` is the tensor of the part `level`, None where this condition has no such part. `dropped` (B,) bool
    marks samples without any condition. `present` holds a mask (B,) bool for each part that some samples lack. A
    network puts a learned null in the place of what is dropped or lacking.
    """

    def __init__(
        self,
        *,
        dropped: torch.Tensor | None = None,
        present: Mapping[str, torch.Tensor] | None = None,
        **tensors: torch.Tensor | None,
    ):
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.present, self.dropped = dict(present or {}), dropped

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.get("tensors", {}).get(name)

    @property
    def _anchor(self) -> torch.Tensor:
        return next(iter([*self.tensors.values(), self.dropped]))  # `dropped` alone says how many have no parts

    def __len__(self) -> int:
        return len(self._anchor)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Condition":
        tensors, present = ({name: function(v) for name, v in d.items()} for d in (self.tensors, self.present))
        dropped = None if self.dropped is None else function(self.dropped)
        return Condition(dropped=dropped, present=present, **tensors)

    def to(self, device: torch.device) -> "Condition":
        return self._map(lambda tensor: tensor.to(device))

    def index(self, rows) -> "Condition":
        """The condition of some samples; `rows` is a slice, a list of numbers or a mask."""
        return self._map(lambda tensor: tensor[rows])

    def replace(self, **tensors: torch.Tensor | None) -> "Condition":
        """The same condition with other tensors for some parts, or another `dropped`; None removes a part."""
        return Condition(**{"dropped": self.dropped, "present": self.present, **self.tensors, **tensors})

    def permuted(self, parts: Sequence[str], order: torch.Tensor) -> "Condition":
        """The same condition in which sample i has what sample order[i] has of some parts."""
        tensors = {name: self.tensors[name][order] for name in parts}
        present = self.present | {name: self.present[name][order] for name in parts if name in self.present}
        return self.replace(present=present, **tensors)

    def drop(self, mask: torch.Tensor) -> "Condition":
        """The same condition with the samples of a (B,) bool mask dropped to the null."""
        return self.replace(dropped=mask if self.dropped is None else self.dropped | mask)

    def without(self, part: str, mask: torch.Tensor) -> "Condition":
        """The same condition in which the samples of a (B,) bool mask lack an optional part."""
        present = self.present.get(part, self._mask(True)) & ~mask
        return self.replace(present={**self.present, part: present})

    def null(self) -> "Condition":
        """The unconditional condition of the same samples; parts that stay (the clean source image) stay."""
        return self.drop(self._mask(True))

    def _mask(self, value: bool) -> torch.Tensor:
        return torch.full((len(self),), value, dtype=torch.bool, device=self._anchor.device)

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Conditions joined along the batch; all must have the same parts."""

        def joined(masks: list[torch.Tensor | None], *, default: bool) -> torch.Tensor:
            pairs = zip(masks, conditions, strict=True)
            return torch.cat([c._mask(default) if mask is None else mask for mask, c in pairs])

        dropped = [c.dropped for c in conditions]
        present = {name: [c.present.get(name) for c in conditions] for c in conditions for name in c.present}
        return Condition(
            dropped=None if all(mask is None for mask in dropped) else joined(dropped, default=False),
            present={name: joined(masks, default=True) for name, masks in present.items()},
            **{name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors},
        )


class Names(NamedTuple):
    """What a data set's numbers of classes and of batches mean, and the folder that it lies in."""

    classes: tuple[str, ...]
    batches: tuple[str, ...] = ()
    root: Path = Path()


class Part(ABC):
    """One thing that a network is conditioned on. A part is constructed with the names of classes and batches, the
    number of channels of a state, and its own settings.

    `form` says what the embedding is: a `vector` (B, width) that networks add to the time's, `tokens` (B, L, width)
    that they attend to, or a `map` (B, channels, H, W) that they lay beside the state. A dropped condition replaces
    the sum of all vectors by one learned null, and tokens and maps by nulls of their own; a map that `stays` is kept.
    An `optional` part may be absent from single samples; it has a null of its own, too. Parts `of_target` say what a
    sample is to become; the others say what it is, or where it comes from.
    """

    name: str
    form: Literal["vector", "tokens", "map"] = "vector"
    stays: bool = False
    optional: bool = False
    of_target: bool = False
    field: str = ""  # what it reads, and the name of its weights in a checkpoint, if not the part's own name
    slot: str = ""

    def __init__(self, names: Names, channels: int):
        self.names, self.num_classes, self.channels = names, len(names.classes), channels

    def read(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The part's tensor (B, ...) for B samples: by default the field `field`, or that of the part's name.

        `fields` are what is known of the samples: x0 (B, C, H, W), the clean source states; source_class and
        target_class (B,) int64; target_level (B, num_classes) float32, the soft label of the target; batch (B,) int64,
        -1 where not known; dose (B,) float32, that of the target, 0 for none; in training also source_index and
        target_index (B,), the patches' numbers in the data set. All lie on the network's device.
        """
        return fields[self.field or self.name]

    def is_present(self, fields: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Which samples (B,) bool have this part; None where all have it. `read` gives the others any value."""
        return None

    @abstractmethod
    def embedding(self, width: int) -> nn.Module:
        """The module that embeds the part's tensor. Vectors begin with a mean square near 1 an entry, as the learned
        vectors of classes do, which is more than the time's: a condition that begins far weaker stays ignored."""

    def prepare(self, embedding: nn.Module) -> None:  # noqa: B027
        """Put what is read and not learned into the module, before a training; UserError for what cannot be used."""


def begin_at_one(layer: nn.Linear) -> nn.Linear:
    """The layer with weights that turn entries of mean square 1 into such, and no bias to begin with."""
    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class ConditionSpec(NamedTuple):
    """The parts of a network's condition; they belong to its architecture."""

    parts: tuple[Part, ...]

    @property
    def map_channels(self) -> int:
        return sum(part.channels for part in self.parts if part.form == "map")

    @property
    def dropped_alone(self) -> tuple[str, ...]:
        """The names of parts that training drops by themselves, too: those that may be absent, unless nothing else says
        what the target is."""
        of_target = [part.name for part in self.parts if part.of_target]
        return tuple(part.name for part in self.parts if part.optional and [part.name] != of_target)

    def has(self, form: str) -> bool:
        return any(part.form == form for part in self.parts)

    def read(self, fields: Mapping[str, torch.Tensor]) -> Condition:
        """The condition of samples of which `fields` are known: see `Part.read`."""
        present = {part.name: part.is_present(fields) for part in self.parts}
        return Condition(
            present={name: mask for name, mask in present.items() if mask is not None},
            **{part.name: part.read(fields) for part in self.parts},
        )


class ConditionEmbedding(nn.Module):
    """Embeds all parts of a condition, with learned nulls for what is dropped or absent.

    `forms` are those that the network can use; UserError for a part of another form.
    """

    def __init__(self, spec: ConditionSpec, width: int, *, forms: Sequence[str]):
        super().__init__()
        self._parts = spec.parts
        self.null, self.nulls = nn.Parameter(torch.zeros(width)), nn.ParameterDict()
        for part in spec.parts:
            if part.form not in forms:
                raise UserError(
                    f"condition: part {part.name!r} gives {part.form}, this network takes {', '.join(forms)}; choose "
                    "another velocity.name, or leave the part out"
                )
            self.add_module(part.slot or part.name, part.embedding(width))
            if part.optional or not (part.form == "vector" or part.stays):
                size = (part.channels, 1, 1) if part.form == "map" else (width,)
                self.nulls[part.name] = nn.Parameter(torch.zeros(size))

    def prepare(self) -> None:
        """Let every part put in what it reads: see `Part.prepare`."""
        for part in self._parts:
            part.prepare(self.get_submodule(part.slot or part.name))

    def forward(self, cond: Condition) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """The vector (B, width), the tokens (B, L, width) or None, and the maps (B, C, H, W)."""
        found: dict[str, list[torch.Tensor]] = {"vector": [], "tokens": [], "map": []}
        for part in self._parts:
            value = self.get_submodule(part.slot or part.name)(cond.tensors[part.name])
            if part.name in self.nulls:
                absent = self._absent(part, cond).view(-1, *[1] * (value.ndim - 1))
                value = torch.where(absent, self.nulls[part.name], value)
            found[part.form].append(value)
        vector = reduce(torch.add, found["vector"]) if found["vector"] else self.null.expand(len(cond), -1)
        if cond.dropped is not None:
            vector = torch.where(cond.dropped[:, None], self.null, vector)
        return vector, torch.cat(found["tokens"], dim=1) if found["tokens"] else None, found["map"]

    @staticmethod
    def _absent(part: Part, cond: Condition) -> torch.Tensor:
        """Which samples (B,) bool lack a part, or all that could stand in its place."""
        absent = ~cond.present.get(part.name, cond._mask(True))
        is_dropped = cond.dropped is not None and not part.stays and part.form != "vector"
        return absent | cond.dropped if is_dropped else absent

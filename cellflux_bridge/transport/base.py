"""Transport methods: ways to carry images to levels between source and target along a trained flow.

One file is one method. Its class is named like the file and derives from `Transport`; the keyword arguments of its
constructor are its keys in the section `translate`, where they stand beside the common ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import AfterValidator, Field

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config.schema import Few, Fraction
from cellflux_bridge.field.base import Evaluation, evaluate
from cellflux_bridge.path.base import Path
from cellflux_bridge.transport.integrate import Interval, integrate


def _rising(values: list[float], *, strictly: bool = False) -> list[float]:
    if values != sorted(set(values) if strictly else values) or values[0] == 0:
        how = "rise strictly" if strictly else "never fall"
        raise ValueError(f"these must {how}, from above 0 to at most 1 (0 is the source itself)")
    return values


def _to_the_target(levels: list[float]) -> list[float]:
    if _rising(levels, strictly=True)[-1] != 1:
        raise ValueError(f"the last level must be 1, the target, found {levels[-1]}")
    return levels


_Fractions = Annotated[list[Fraction], Field(min_length=1)]
Rising = Annotated[_Fractions, AfterValidator(_rising)]
Levels = Few | Annotated[_Fractions, AfterValidator(_to_the_target)]  # how many, or which
Solver = Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5", "shortcut"]


class Result(NamedTuple):
    """What transport returns: frames (K+1, B, C, H, W) float32, states whose first is the source itself; network
    forwards and classifier gradients per sequence, summed over its levels; and of methods that go back towards noise
    how far each frame did, depths (K+1,), 0 first."""

    frames: torch.Tensor
    nfe: int
    gradients: int
    depths: torch.Tensor | None = None


@dataclass(frozen=True)
class Flow:
    """A trained flow as transport methods see it, between one source class and one target class."""

    path: Path
    by_level: bool  # its condition is a level, otherwise a class
    reaches_source: bool  # it was trained with the source class as a target
    is_guided: bool  # a classifier steers `field`
    batch_size: int  # rows that go through the network at once, at most
    labels: Callable[[torch.Tensor], torch.Tensor]  # levels (...) -> soft labels (..., num_classes)
    # source states (R, C, H, W), target labels (R, num_classes), the number of each one's source (R,) -> condition
    condition: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Condition]
    plain: Callable  # the velocity without a classifier
    field: Callable[[torch.Tensor], Callable]  # target labels (R, num_classes) -> the velocity steered toward them
    shortcut: "Shortcuts | None" = None  # mean velocities over long steps, where a run has them


class Shortcuts(Protocol):
    """Velocities for Euler's method in few steps (see `flow.shortcut`); `steps` are the most."""

    steps: int

    def __call__(self, num: int) -> Callable:
        """The velocity v(t, x, cond) of a way from 0 to 1 in `num` steps."""


class Measured(NamedTuple):
    """What guides see at G evenly spaced conditions from 0 to 1, on average over validation patches: the probability
    of the target class (G), the distance in features from what condition 0 gives (G), and the distance between
    neighbouring conditions (G - 1)."""

    probability: list[float]
    distance: list[float]
    steps: list[float]


class LevelMeter(Protocol):
    """Guides of images as an instrument, for methods that are calibrated (see `translation.level_calibration`)."""

    def measured(self, make: Callable[..., Result]) -> Measured:
        """What guides see in make(x0, noise=, conditions=), which carries x0 (B, C, H, W) to conditions (G,)."""

    def share(self, make: Callable[..., Result]) -> None:
        """Measure once for all processes; every process calls this."""

    def see(self, states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of states (K, B, C, H, W): mean probability of the target class (K, B), and all features (K, B, F)."""


class Transport(ABC):
    """One way to carry images. `reverse`: images of the target go back to the source. `is_calibrated`: guides of
    images measure levels, so that there must be some. `takes_shortcuts`: solver=shortcut is possible."""

    reverse: bool = False
    is_calibrated: bool = False
    takes_shortcuts: bool = False

    @property
    def suffix(self) -> str:
        """What the folder of a translation is called after its classes; at most 40 bytes."""
        return type(self).__name__.lower()[:40]

    @abstractmethod
    def require(self, flow: Flow, *, given: Mapping[str, Any]) -> None:
        """UserError for what this method cannot do with a flow; `given` are the keys that were set for this use."""

    @abstractmethod
    def levels(self, flow: Flow, meter: LevelMeter) -> tuple[float, ...]:
        """The levels of all frames: 0 first, 1 last."""

    def prepare(self, flow: Flow, meter: LevelMeter) -> None:  # noqa: B027
        """Measure what all sequences share, where a method needs this. It does not count as their cost."""

    @abstractmethod
    def carry(
        self, flow: Flow, x0: torch.Tensor, *, noise: torch.Tensor, levels: torch.Tensor, meter: LevelMeter
    ) -> Result:
        """Carry source states x0 (B, C, H, W) to `levels` (K,), those of `levels()` but the first; `noise` is shaped
        like x0 and standard normal."""


def uniform_levels(levels: int | list[float]) -> tuple[float, ...]:
    """0 and the levels that a key `levels` names: these, or as many, evenly spaced."""
    if isinstance(levels, list):
        return (0.0, *levels)
    return tuple(round(k / levels, 6) for k in range(levels + 1))


def source_noise(shape: Sequence[int], source_ids: Sequence[str], *, seed: int) -> torch.Tensor:
    """Standard normal noise (B, *shape), one draw a source, the same in any batch and on any rank."""
    generators = (torch_generator(seed, "source noise", name) for name in source_ids)
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def at_trained_times(velocity: Callable, path: Path) -> Callable[..., Evaluation]:
    """The velocity, evaluated at the nearest time for which networks of this path (and guides of states) are
    trained: the Brownian path's velocity has no limit at t = 0 and 1."""
    return lambda t, x, cond: evaluate(velocity, path.trained(t), x, cond)


def carry_rows(
    flow: Flow,
    start: torch.Tensor,
    x0: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor | None,
    *,
    interval: Interval,
    steps: int,
    solver: str,
) -> Result:
    """The ends (K, B, C, H, W) of integrations to K levels of B sources, and what they took per source.

    They begin at `start` (K, B, C, H, W). The network's condition is soft labels `labels` (K, B or 1, num_classes) and
    the sources x0 (B, C, H, W); a classifier steers toward `targets`, shaped like labels, or not at all. The ends of
    the interval are numbers, or (K,). The solver may be "shortcut", without a classifier and between numbers: a step
    is then one shortcut.
    """
    levels, sources = start.shape[:2]

    def in_rows(values: torch.Tensor) -> torch.Tensor:
        return values.expand(levels, sources, *values.shape[2:]).flatten(0, 1)

    start, x0, labels = in_rows(start), in_rows(x0[None]), in_rows(labels)
    targets = None if targets is None else in_rows(targets)
    begin, end = (in_rows(torch.as_tensor(at).expand(levels)[:, None].to(x0)) for at in interval)
    ends, nfe, gradients = [], 0, 0
    for rows in torch.arange(len(start), device=x0.device).split(flow.batch_size):
        if solver == "shortcut":
            field = flow.shortcut(round(steps / (interval[1] - interval[0])))
        else:
            field = at_trained_times(flow.plain if targets is None else flow.field(targets[rows]), flow.path)
        cond = flow.condition(x0[rows], labels[rows], rows % sources)
        how = {"steps": steps, "solver": "euler" if solver == "shortcut" else solver}
        result = integrate(field, start[rows], cond, interval=(begin[rows], end[rows]), **how)
        ends.append(result.states[-1])
        nfe, gradients = nfe + result.nfe * len(rows), gradients + result.gradients * len(rows)
    return Result(torch.cat(ends).unflatten(0, (levels, sources)), round(nfe / sources), round(gradients / sources))


def require_from_data(method: str, path: Path) -> None:
    """UserError for a path that starts from noise instead of a source image."""
    if not path.from_data:
        raise UserError(
            f"translate.method={method}: path {type(path).__name__} starts from noise, not from a source image; use "
            "method=depth, or train with a path from data (noised_source, brownian, straight, smooth)"
        )

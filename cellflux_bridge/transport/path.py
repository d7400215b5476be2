"""The path method: one source image carried along the flow's ODE, its states shown as frames.

States of a data-to-data path are blends of source and target in their middle, whatever the network (their marginal at
t = 0.5 is the distribution of half-and-half superpositions); only the last frame is a finished image.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.path.base import Path
from cellflux_bridge.transport.integrate import frame_times, integrate


class Morph(NamedTuple):
    """Frames (K+1, B, C, H, W) float32 in about [-1, 1], frame 0 the source itself, and forwards and classifier
    gradients per sequence."""

    frames: torch.Tensor
    nfe: int
    gradients: int


def source_noise(shape: Sequence[int], source_ids: Sequence[str], *, seed: int) -> torch.Tensor:
    """Standard normal noise (B, *shape), one draw a source, the same in any batch and on any rank."""
    draws = [torch.randn(*shape, generator=torch_generator(seed, "source noise", name)) for name in source_ids]
    return torch.stack(draws)


def _interval(path: Path, reverse: bool) -> tuple[float, float]:
    name = type(path).__name__
    if not path.from_data:
        raise UserError(
            f"path {name}: starts from noise, so no source image can be carried along; "
            "train with a path from data (noised_source, straight, brownian, smooth)"
        )
    if reverse and not path.reversible:
        raise UserError(
            f"translate.reverse: path {name} is not noise-free, its reverse ODE would end at a noised source; "
            "train the opposite transition instead, or use path.name=straight"
        )
    return (1.0, 0.0) if reverse else (path.t_start, 1.0)


def morph_levels(path: Path, *, steps: int, frames: int, solver: str, reverse: bool) -> tuple[float, ...]:
    """The levels of `morph`'s frames: how far along each is, 0 the source and 1 the end; refuses what `morph` does."""
    times = frame_times(steps=steps, frames=frames, solver=solver, interval=_interval(path, reverse)).tolist()
    return (0.0, *(round(1 - t if reverse else t, 6) for t in times[1:-1]), 1.0)


def morph(
    velocity: Callable,
    path: Path,
    x0: torch.Tensor,
    cond: Condition,
    *,
    noise: torch.Tensor,
    steps: int = 25,
    frames: int = 11,
    solver: str = "midpoint",
    reverse: bool = False,
) -> Morph:
    """Carry source images x0 (B, C, H, W) in [-1, 1] to the target of `cond`.

    `noise` (B, C, H, W) is what a noised path starts with; frames are shown without the share of it that the state
    still carries. With `reverse`, x0 are images of the condition's *target* and are carried back to its source by the
    reverse ODE, which only a noise-free straight path allows. Raises UserError where the path cannot do what is asked.
    """
    interval = _interval(path, reverse)
    start = x0 if reverse else path.start(x0, noise)
    result = integrate(velocity, start, cond, steps=steps, frames=frames, solver=solver, interval=interval)
    shown = [path.without_noise(x, t, noise) for x, t in zip(result.states, result.times, strict=True)]
    return Morph(torch.stack([x0, *shown[1:]]), result.nfe, result.gradients)

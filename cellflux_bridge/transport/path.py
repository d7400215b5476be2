"""The path method: one source image carried along the flow's ODE, its states shown as frames.

States of a data-to-data path are blends of source and target in their middle, whatever the network (their marginal at
t = 0.5 is the distribution of half-and-half superpositions); only the last frame is a finished image.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config.schema import Count
from cellflux_bridge.path import base as paths
from cellflux_bridge.transport.base import Result, Solver, Transport, at_trained_times, require_from_data
from cellflux_bridge.transport.integrate import frame_times, integrate


class Path(Transport):
    """States of one integration, at `frames` times. `reverse` carries images of the target back to the source by the
    reverse ODE, which only a noise-free straight path allows."""

    def __init__(
        self,
        *,
        steps: Count = 25,
        solver: Solver = "midpoint",
        frames: Annotated[int, Field(ge=2)] = 11,
        reverse: bool = False,
    ):
        self._grid, self.reverse = {"steps": steps, "solver": solver, "frames": frames}, reverse

    @property
    def suffix(self) -> str:
        return "path_reverse" if self.reverse else "path"

    def require(self, flow, *, given) -> None:
        self._interval(flow.path)
        if self.reverse and flow.is_guided:
            raise UserError("translate.reverse: goes back unguided; set translate.guidance.form=none")

    def _interval(self, path: paths.Path) -> tuple[float, float]:
        require_from_data("path", path)
        if self.reverse and not path.reversible:
            raise UserError(
                f"translate.reverse: path {type(path).__name__} is not noise-free, its reverse ODE would end at a "
                "noised source; train the opposite transition instead, or use path.name=straight"
            )
        return (1.0, 0.0) if self.reverse else (path.t_start, 1.0)

    def levels(self, flow, meter) -> tuple[float, ...]:
        """How far along each frame is."""
        times = frame_times(**self._grid, interval=self._interval(flow.path)).tolist()
        return (0.0, *(round(1 - t if self.reverse else t, 6) for t in times[1:-1]), 1.0)

    def carry(self, flow, x0, *, noise, levels, meter) -> Result:
        target = flow.labels(torch.tensor([0.0 if self.reverse else 1.0])).expand(len(x0), -1)
        cond = flow.condition(x0, target, torch.arange(len(x0), device=x0.device))
        return self.along(flow.field(target), flow.path, x0, cond, noise=noise)

    def along(
        self, velocity: Callable, path: paths.Path, x0: torch.Tensor, cond: Condition, *, noise: torch.Tensor
    ) -> Result:
        """Carry states x0 (B, C, H, W) to the target of `cond`.

        `noise`, like x0, is what a noised path starts with; frames are shown without the share of it that is left.
        """
        start, interval = x0 if self.reverse else path.start(x0, noise), self._interval(path)
        result = integrate(at_trained_times(velocity, path), start, cond, **self._grid, interval=interval)
        shown = [path.without_noise(x, t, noise) for x, t in zip(result.states, result.times, strict=True)]
        return Result(torch.stack([x0, *shown[1:]]), result.nfe, result.gradients)

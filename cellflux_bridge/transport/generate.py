"""The generate method: images of the target's class from noise alone, the rival that every bridge is compared with."""

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import Count
from cellflux_bridge.transport.base import Result, Solver, Transport, carry_rows


class Generate(Transport):
    """From noise at t = 0 to the target at t = 1, in `steps` steps. A sequence has its source and one image of level 1,
    which owes the source nothing but the seed of its noise. Guidance steers toward the target's class."""

    takes_shortcuts = True

    def __init__(self, *, steps: Count = 25, solver: Solver = "midpoint"):
        self._steps, self._solver = steps, solver

    def require(self, flow, *, given) -> None:
        if flow.path.from_data:
            raise UserError(
                f"translate.method=generate: path {type(flow.path).__name__} starts from source images; train with "
                "path.name=gaussian_source, or use method=progression or path"
            )

    def levels(self, flow, meter) -> tuple[float, ...]:
        return (0.0, 1.0)

    def carry(self, flow, x0, *, noise, levels, meter) -> Result:
        labels, start = flow.labels(torch.ones(1, 1)), flow.path.start(x0, noise)
        how = {"interval": (flow.path.t_start, 1.0), "steps": self._steps, "solver": self._solver}
        found = carry_rows(flow, start[None], x0, labels, labels, **how)
        return found._replace(frames=torch.cat([x0[None], found.frames]))

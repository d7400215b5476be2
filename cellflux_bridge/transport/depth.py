"""The depth method: a flow from Gaussian noise takes each source back to K depths and forward to K levels.

Back under the source's class, forward under another level; every frame is the end of an integration of its own. Depths
that rise, all with the target's condition, are Cellflow's sequence in flow-matching form (arXiv 2311.12316 and its
successors: DDIM there). Full depth with rising conditions is invert-and-regenerate (arXiv 2608.16424).
"""

from typing import Literal

import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import Count
from cellflux_bridge.transport.base import Levels, Result, Rising, Solver, Transport, carry_rows, uniform_levels


class Depth(Transport):
    """Back from t = 1 to 1 - depth, once for all levels, and forward to 1 from each depth.

    On the way back the condition is the source's label, without guidance. On the way forward it is `conditions` (with
    guidance of form `score` none), and a guide steers toward the same soft labels. Each way forward takes `steps`
    steps; the way back about `steps` a unit of depth, and at least one between two depths.

    depths: how far back each level starts: rising (k / K), full (1), or numbers in (0, 1].
    conditions: the level of each frame: target (1), rising (k / K), or numbers in (0, 1].
    """

    def __init__(
        self,
        *,
        steps: Count = 25,
        solver: Solver = "midpoint",
        levels: Levels = 10,
        depths: Literal["rising", "full"] | Rising = "rising",
        conditions: Literal["target", "rising"] | Rising = "target",
    ):
        self._steps, self._solver = steps, solver
        self._levels, self._depths, self._conditions = levels, depths, conditions

    def require(self, flow, *, given) -> None:
        path = type(flow.path).__name__
        if flow.path.from_data:
            raise UserError(
                f"translate.method=depth: path {path} starts from source images; the depth method needs a flow from "
                "noise (path.name=gaussian_source). This flow can do method=progression or path"
            )
        if not flow.reaches_source:
            raise UserError(
                "translate.method=depth: the condition of the way back is the source's class, which was never a "
                "target in this network's training; train with pairs.identity=true, or condition.target=level"
            )
        if self._conditions != "target" and not flow.by_level:
            raise UserError(
                "translate.conditions: the network knows classes only; train with condition.target=level, or use "
                "conditions=target"
            )
        num = len(uniform_levels(self._levels)) - 1
        for key, values in (("depths", self._depths), ("conditions", self._conditions)):
            if isinstance(values, list) and len(values) != num:
                raise UserError(f"translate.{key}: {len(values)} values for {num} levels; give as many")

    def levels(self, flow, meter) -> tuple[float, ...]:
        return uniform_levels(self._levels)

    def carry(self, flow, x0, *, noise, levels, meter) -> Result:
        words = {"rising": levels, "full": torch.ones_like(levels), "target": torch.ones_like(levels)}
        conditions, depths = (
            torch.tensor(given) if isinstance(given, list) else words[given]
            for given in (self._conditions, self._depths)
        )
        labels, source = flow.labels(conditions)[:, None], flow.labels(torch.zeros(1, 1))
        starts, x, reached, nfe = [], x0[None], 0.0, 0
        for depth in depths.tolist():
            if depth > reached:
                how = {"interval": (1 - reached, 1 - depth), "steps": max(1, round(self._steps * (depth - reached)))}
                x, forwards, *_ = carry_rows(flow, x, x0, source, None, **how, solver=self._solver)
                nfe, reached = nfe + forwards, depth
            starts.append(x)
        how = {"interval": (1 - depths, 1.0), "steps": self._steps, "solver": self._solver}
        found = carry_rows(flow, torch.cat(starts), x0, labels, labels, **how)
        frames, depths = torch.cat([x0[None], found.frames]), torch.cat([torch.zeros(1), depths])
        return Result(frames, nfe + found.nfe, found.gradients, depths)

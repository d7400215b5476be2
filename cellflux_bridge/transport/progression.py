"""The progression method: a data-to-data flow conditioned on the level takes one source image to K levels.

Every frame is the END of an integration of its own from the same source, so that it is a finished image and no blend.
"""

from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config.schema import Count, Fraction
from cellflux_bridge.transport.base import (
    Flow,
    LevelMeter,
    Levels,
    Result,
    Solver,
    Transport,
    carry_rows,
    require_from_data,
    uniform_levels,
)

# Of the coarse progression that calibrates one source: conditions, and steps to each.
_NUM_OWN, _OWN_STEPS = 8, 2
# Back to the noise of a source, where shortcuts go forth: midpoint steps at least, and corrections of each shortcut.
_BACK_STEPS, _CORRECTIONS = 4, 2


class Progression(Transport):
    """All levels of all sources as one batch.

    solver: of every level's integration in `steps` steps; shortcut, without a classifier, takes a single forward a step
        (`flow/shortcut.py`); the way back to the noise of a source then inverts each of them.
    spacing: adaptive chooses levels whose frames lie about equally far apart for the guides.
    calibrate: the network's condition for a level is the level itself (none); or the condition at which, on validation
        patches, the guides' mean probability of the target is the level (probability); or that at which this share of
        the way in the guides' features is made (distance).
    calibrate_each: on each source by itself, by a coarse progression of its own, instead of on validation patches.
    noise_resampling: null starts every level from the same random noise. A number starts from the noise from which
        the flow gives the source back (DDIM inversion; Song et al. 2021, sec. 4.3) and replaces the share
        noise_resampling * level of it by random noise: a quarter turn at 1, so that Gaussian noise stays as strong
        as it was. So the frames leave their source gradually, in even steps also where `calibrate` finds conditions
        that lie far apart; what level 1 looks like is still the flow's own choice.
    """

    takes_shortcuts = True

    def __init__(
        self,
        *,
        steps: Count = 25,
        solver: Solver = "midpoint",
        levels: Levels = 10,
        spacing: Literal["uniform", "adaptive"] = "uniform",
        calibrate: Literal["none", "probability", "distance"] = "none",
        calibrate_each: bool = False,
        noise_resampling: Fraction | None = None,
    ):
        self._steps, self._solver = steps, solver
        self._levels, self._spacing, self._calibrate = levels, spacing, calibrate
        self._each = calibrate != "none" and calibrate_each
        self._asks_each, self._resampling = calibrate_each, noise_resampling
        self.is_calibrated = calibrate != "none" or spacing == "adaptive"

    def require(self, flow, *, given) -> None:
        require_from_data("progression", flow.path)
        if not flow.by_level:
            raise UserError(
                "translate.method=progression: the network knows classes only, not the levels between; train with "
                "condition.target=level, or use method=path"
            )
        if self._asks_each and "calibrate_each" in given and not self._each:
            raise UserError("translate.calibrate_each=true: set translate.calibrate=probability or distance, too")
        if self._spacing == "adaptive" and self._each:
            raise UserError(
                "translate.calibrate_each=true: adaptive levels are those of validation patches; set "
                "translate.calibrate_each=false, or spacing=uniform"
            )
        if self._spacing == "adaptive" and isinstance(self._levels, list):
            raise UserError("translate.spacing=adaptive: chooses the levels itself; give their number (levels=10)")
        if self._resampling is not None and flow.path.noise_scale(torch.tensor(flow.path.t_start)) == 0:
            raise UserError(
                f"translate.noise_resampling: path {type(flow.path).__name__} starts without noise, so there is none "
                "to replace; leave it null, or train with path.name=noised_source or brownian"
            )

    def levels(self, flow, meter) -> tuple[float, ...]:
        if self._spacing == "uniform":
            return uniform_levels(self._levels)
        # How far the way goes is known by condition; that of a level is the way to the condition for it.
        measured = meter.measured(partial(self._to_conditions, flow))
        travelled = np.cumsum([0.0, *measured.steps])
        grid = np.linspace(0, 1, 10 * len(measured.steps) + 1)
        conditions = self._conditions(torch.from_numpy(grid), flow, meter)
        way = np.interp(conditions.numpy(), np.linspace(0, 1, len(travelled)), travelled)
        levels = (0.0, *equidistant_levels(grid, way, self._levels).round(4).tolist())
        if any(a >= b for a, b in pairwise(levels)):
            raise UserError(
                f"translate.spacing=adaptive: the guide sees no {self._levels} levels apart in what this network "
                "makes; set fewer levels, or spacing=uniform"
            )
        return levels

    def carry(self, flow, x0, *, noise, levels, meter) -> Result:
        inverted, forwards = self.inverted(flow, x0)
        if self._each:
            conditions, coarse = self._conditions_of_each(flow, x0, noise, inverted, levels, meter)
            forwards += coarse
        else:
            conditions = self._conditions(levels, flow, meter)
        found = self.run(flow, x0, noise, conditions, levels, targets=levels, inverted=inverted, steps=self._steps)
        return found._replace(nfe=found.nfe + forwards)

    def prepare(self, flow, meter) -> None:
        if self.is_calibrated and not self._each:
            meter.share(partial(self._to_conditions, flow))

    def _to_conditions(self, flow, x0, *, noise, conditions) -> Result:
        """Carry validation patches x0 to conditions (G,), unguided, to learn which levels these give."""
        inverted, _ = self.inverted(flow, x0)
        return self.run(flow, x0, noise, conditions, conditions, targets=None, inverted=inverted, steps=self._steps)

    def inverted(self, flow: Flow, x0: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        """The states (B, C, H, W) from which the unguided flow gives sources x0 back under their own label, and
        forwards per source; only where noise is resampled."""
        if self._resampling is None:
            return None, 0
        label = flow.labels(torch.zeros(1, 1))
        if self._solver == "shortcut":
            return _through_shortcuts(flow, x0, label, steps=self._steps)
        back, how = (1.0, flow.path.t_start), {"steps": self._steps, "solver": self._solver}
        found = carry_rows(flow, x0[None], x0, label, None, interval=back, **how)
        return found.frames[0], found.nfe

    def run(
        self,
        flow: Flow,
        x0: torch.Tensor,
        noise: torch.Tensor,
        conditions: torch.Tensor,
        levels: torch.Tensor,
        *,
        targets: torch.Tensor | None,
        inverted: torch.Tensor | None,
        steps: int,
    ) -> Result:
        """Carry x0 (B, C, H, W) to levels (K,) under conditions (K,), or (K, B) where each source has its own.

        A classifier steers toward the soft labels of levels `targets` (K,), or not at all. All levels of a source
        start from the same noise, or from `inverted` states with a share of new noise, which rises with the level.
        """
        conditions = conditions.view(len(conditions), -1)
        random = flow.path.start(x0, noise)
        start = random.expand(len(conditions), *x0.shape)
        if inverted is not None:
            turn = torch.pi / 2 * (self._resampling * levels).to(x0)[:, None, None, None, None]
            start = x0 + torch.cos(turn) * (inverted - x0) + torch.sin(turn) * (random - x0)
        goals = None if targets is None else flow.labels(targets[:, None])
        how = {"interval": (flow.path.t_start, 1.0), "steps": steps, "solver": self._solver}
        found = carry_rows(flow, start, x0, flow.labels(conditions), goals, **how)
        return found._replace(frames=torch.cat([x0[None], found.frames]))

    def _conditions(self, levels: torch.Tensor, flow: Flow, meter: LevelMeter) -> torch.Tensor:
        """The conditions (K,) in [0, 1] that reach levels (K,), as measured on validation patches."""
        if self._calibrate == "none":
            return levels
        measured = meter.measured(partial(self._to_conditions, flow))
        reached = measured.probability if self._calibrate == "probability" else _share(np.array(measured.distance))
        return condition_for(levels, torch.linspace(0, 1, len(reached)), np.asarray(reached))

    def _conditions_of_each(self, flow, x0, noise, inverted, levels, meter) -> tuple[torch.Tensor, int]:
        """The conditions (K, B) that reach levels (K,) of each source, by what guides see in a coarse, unguided
        progression of it; and the forwards that it took."""
        grid = torch.linspace(0, 1, _NUM_OWN)
        steps = min(_OWN_STEPS, self._steps) if self._solver == "shortcut" else _OWN_STEPS
        coarse = self.run(flow, x0, noise, grid[1:], grid[1:], targets=None, inverted=inverted, steps=steps)
        reached, features = meter.see(coarse.frames)
        if self._calibrate == "distance":
            reached = _share(np.linalg.norm(features - features[0], axis=2))
        return torch.stack([condition_for(levels, grid, of) for of in reached.T], dim=1), coarse.nfe


def _through_shortcuts(flow: Flow, x0: torch.Tensor, label: torch.Tensor, *, steps: int) -> tuple[torch.Tensor, int]:
    """The states (B, C, H, W) from which `steps` shortcuts give sources x0 back, nearly, and forwards per source.

    Shortcuts learned from random noise. What the flow's way back ends at is none, and shortcuts lead from there to
    another image. So every shortcut x' = f(x) is inverted: from where the flow leads back, x moves by half of what its
    image lacks, x + (x' - f(x)) / 2, a damped fixed-point iteration (Krasnoselskii 1955).
    """
    state, forwards = x0, 0
    back = {"steps": max(1, _BACK_STEPS // steps), "solver": "midpoint"}
    for step in reversed(range(steps)):
        wanted, part = state, (step / steps, (step + 1) / steps)
        found = carry_rows(flow, wanted[None], x0, label, None, interval=part[::-1], **back)
        state, forwards = found.frames[0], forwards + found.nfe + _CORRECTIONS
        for _ in range(_CORRECTIONS):
            there = carry_rows(flow, state[None], x0, label, None, interval=part, steps=1, solver="shortcut")
            state = state + (wanted - there.frames[0]) / 2
    return state, forwards


def _share(distance: np.ndarray) -> np.ndarray:
    return distance / np.maximum(distance[-1], 1e-12)


def condition_for(levels: torch.Tensor, grid: torch.Tensor, reached: np.ndarray) -> torch.Tensor:
    """Conditions (K,) float32 that reach levels (K,), where images reach `reached` (G,) under conditions `grid` (G,).

    The grid rises from 0 to 1; `reached` is made monotone by isotonic regression and inverted. Conditions 0 and 1 give
    level 0 and level 1 by definition, however unsure a guide is, so that no two levels have the same condition.
    """
    conditions = grid.double().numpy()
    rising = IsotonicRegression().fit_transform(conditions, np.asarray(reached, float)).clip(0, 1)
    rising[0], rising[-1] = 0, 1
    rising += 1e-6 * np.linspace(0, 1, len(grid))  # flat stretches keep an inverse
    found = torch.from_numpy(np.interp(levels.double().numpy(), rising, conditions)).float()
    return torch.where(levels == 1, 1.0, found)


def equidistant_levels(grid: np.ndarray, travelled: np.ndarray, num: int) -> np.ndarray:
    """`num` levels, the last one 1, between which the way is equal; `travelled` (G,) is the way to the levels `grid`
    (G,), which rise from 0 to 1. Where nothing moves, a level lies at the beginning of the stretch."""
    goals = travelled[-1] * np.arange(1, num + 1) / num
    levels = np.interp(goals, travelled + 1e-12 * grid, grid)
    levels[-1] = 1
    return levels

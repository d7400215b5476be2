"""Integration of a velocity by torchdiffeq, on a step grid that frames never change."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torchdiffeq import odeint

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.field.base import evaluate

ADAPTIVE = ("dopri5",)

# From where to where: two numbers, or two tensors (B,) where samples differ.
Interval = tuple[float | torch.Tensor, float | torch.Tensor]


class Integration(NamedTuple):
    """States (K+1, B, C, H, W) float32 at times (K+1,), or (K+1, B) where samples have their own, and how many network
    forwards and classifier gradients each image took."""

    states: torch.Tensor
    times: torch.Tensor
    nfe: int
    gradients: int


def _frame_steps(steps: int, frames: int) -> np.ndarray:
    """The grid points, of 0..steps, that lie nearest to equal spacing."""
    return np.rint(np.linspace(0, steps, frames)).astype(int)


def frame_times(*, steps: int, frames: int, solver: str, interval: Interval = (0.0, 1.0)) -> torch.Tensor:
    """Times (frames,) float64, or (frames, B) of intervals (B,), at which `integrate` returns states.

    Raises UserError for more frames than a fixed-step solver has states.
    """
    is_adaptive = solver in ADAPTIVE
    if not is_adaptive and frames > steps + 1:
        raise UserError(
            f"translate.frames={frames}: {steps} steps have {steps + 1} states; raise translate.steps to at least "
            f"{frames - 1}, or lower translate.frames (states between steps would be interpolated, not integrated)"
        )
    fractions = np.linspace(0, 1, frames) if is_adaptive else _frame_steps(steps, frames) / steps
    begin, end = (torch.as_tensor(e).cpu().double() for e in interval)
    return begin + (end - begin) * torch.from_numpy(fractions).view(-1, *(1,) * begin.ndim)


@torch.no_grad()
def integrate(
    velocity: Callable,
    x: torch.Tensor,
    cond,
    *,
    steps: int = 25,
    frames: int = 2,
    solver: str = "midpoint",
    interval: Interval = (0.0, 1.0),
    tolerance: float = 1e-4,
) -> Integration:
    """Carry states x (B, C, H, W) along dx/dt = velocity(t, x, cond) from interval[0] to interval[1], which may be the
    smaller; `velocity`, a network or a field, is called with t (B,).

    Fixed-step solvers (euler, midpoint, heun2, heun3, rk4) take `steps` equal steps whatever the frames; frames are
    states at the grid points nearest to equal spacing, so the end is the same for any number of them (at least 2).
    dopri5 chooses its steps from a norm over the whole batch, so a sample depends on its batch up to `tolerance`
    (absolute and relative). Raises UserError for more frames than grid points.
    """
    times = frame_times(steps=steps, frames=frames, solver=solver, interval=interval)
    begin, end = (torch.as_tensor(e, dtype=torch.float32, device=x.device).expand(len(x)) for e in interval)
    length = (end - begin).view(-1, 1, 1, 1)
    x = x.to(torch.float32)
    # torchdiffeq runs on s in [0, 1]; the grid is built once in float64, so that its end is exact in both directions.
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64).to(x)
    nfe = gradients = 0

    def right_hand_side(s: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal nfe, gradients
        found = evaluate(velocity, begin + (end - begin) * s, state, cond)
        nfe, gradients = nfe + found.forwards, gradients + found.gradients
        return length * found.velocity.to(state.dtype)

    if solver in ADAPTIVE:
        points, how = torch.linspace(0, 1, frames).to(x), {"rtol": tolerance, "atol": tolerance}
    else:
        points = grid[_frame_steps(steps, frames)]
        how = {"options": {"grid_constructor": lambda func, y0, t: grid}}
    states = odeint(right_hand_side, x, points, method=solver, **how)
    return Integration(states, times, nfe, gradients)

"""Stairs: one source image taken to K levels, each the END of an integration of its own, so that every frame is a
finished image and none a blend.

`progression`   a data-to-data flow, told the level: from the same source to every level. Its start noise is random, or
                that which the flow itself gives the source back from (as DDIM inversion does; Song et al. 2021, sec.
                4.3), exchanged for random noise little by little as levels rise: then a stair leaves its source
                gradually, and what level 1 looks like is still the flow's own choice.
`depth`         a flow from Gaussian noise, told the level: back under the source's class to a depth, forward under
                another level. Depths rising toward the target's class are Cellflow's stair in flow-matching form
                (arXiv 2311.12316 and its successors: DDIM there); full depth with rising levels is
                invert-and-regenerate (arXiv 2608.16424).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.isotonic import IsotonicRegression

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.path.base import Path
from cellflux_bridge.transport.integrate import Interval, integrate


class Stair(NamedTuple):
    """Frames (K+1, B, C, H, W) float32 in about [-1, 1], frame 0 the source itself; network forwards and classifier
    gradients per sequence, summed over its levels."""

    frames: torch.Tensor
    nfe: int
    gradients: int


class Field(NamedTuple):
    """A network as stairs see it.

    `condition(x0, told)` makes the Condition of source images (R, C, H, W) and soft labels (R, num_classes);
    `velocity(wanted)` is the network guided toward soft labels (R, num_classes), `plain` the network unguided.
    """

    condition: Callable[[torch.Tensor, torch.Tensor], Condition]
    velocity: Callable[[torch.Tensor], Callable]
    plain: Callable


class Inversion(NamedTuple):
    """Start states (B, C, H, W) that give the sources themselves (see `invert`), of whose noise at each of K levels the
    share `renewed` (K,) or (K, B) in [0, 1] is exchanged for random noise: a quarter turn at 1, so that Gaussian noise
    stays as strong as it was."""

    states: torch.Tensor
    renewed: torch.Tensor


def require_path(method: str, path: Path) -> None:
    """UserError where a stair cannot be built on a path."""
    name = type(path).__name__
    if method == "progression" and not path.from_data:
        raise UserError(
            f"translate.method=progression: path {name} starts from noise, not from a source image; use method=depth, "
            "or train with a path from data (noised_source, brownian, straight, smooth)"
        )
    if method == "depth" and path.from_data:
        raise UserError(
            f"translate.method=depth: path {name} starts from source images; depth stairs need a flow from noise "
            "(path.name=gaussian_source). This flow can do method=progression or path"
        )


def invert(
    field: Field, path: Path, x0: torch.Tensor, *, source: torch.Tensor, steps: int, solver: str, batch_size: int
) -> tuple[torch.Tensor, int]:
    """The states (B, C, H, W) at the path's start from which the flow, told the soft label `source` (num_classes,) and
    unguided, gives sources x0 back; and network forwards per source."""
    states, forwards, _ = _carry(
        field,
        x0,
        x0,
        source.expand(len(x0), -1),
        None,
        interval=(1.0, path.t_start),
        steps=steps,
        solver=solver,
        batch_size=batch_size,
    )
    return states, round(forwards / len(x0))


def progression(
    field: Field,
    path: Path,
    x0: torch.Tensor,
    *,
    told: torch.Tensor,
    wanted: torch.Tensor,
    noise: torch.Tensor,
    inversion: Inversion | None = None,
    steps: int,
    solver: str,
    batch_size: int,
) -> Stair:
    """Carry sources x0 (B, C, H, W) in [-1, 1] to K levels, all levels of all images as one batch.

    The network is told the soft labels `told`, (K, num_classes) or of each source its own (K, B, num_classes), and
    guided toward `wanted` (K, num_classes). All levels of a
    source start from the same noise (B, C, H, W), or as `inversion` says. At most `batch_size` rows go through the
    network at once. Raises UserError for a path that starts from noise.
    """
    require_path("progression", path)
    levels, sources, how = len(told), len(x0), {"solver": solver, "batch_size": batch_size}
    random = path.start(x0, noise)
    start = random.repeat(levels, 1, 1, 1)
    if inversion is not None:
        turn = torch.pi / 2 * inversion.renewed.to(x0).view(levels, -1, 1, 1, 1)
        start = (x0 + torch.cos(turn) * (inversion.states - x0) + torch.sin(turn) * (random - x0)).flatten(0, 1)
    each = told if told.ndim == 3 else told[:, None].expand(-1, sources, -1)
    frames, forwards, gradients = _carry(
        field,
        start,
        x0.repeat(levels, 1, 1, 1),
        each.flatten(0, 1),
        wanted.repeat_interleave(sources, 0),
        interval=(path.t_start, 1.0),
        steps=steps,
        **how,
    )
    frames = torch.cat([x0[None], frames.view(levels, *x0.shape)])
    return Stair(frames, round(forwards / sources), round(gradients / sources))


def depth(
    field: Field,
    path: Path,
    x0: torch.Tensor,
    *,
    source: torch.Tensor,
    depths: torch.Tensor,
    told: torch.Tensor,
    wanted: torch.Tensor,
    steps: int,
    solver: str,
    batch_size: int,
) -> Stair:
    """Carry sources x0 (B, C, H, W) in [-1, 1] back to depths (K,) in (0, 1], rising or equal, and forward again.

    Back from t = 1 unguided, told the soft label `source` (num_classes,), once for all levels; forward from
    t = 1 - depth to 1 told `told` (K, num_classes) and guided toward `wanted`, alike. With guidance of form `score`
    the velocity of the way forward is unconditional, and the guide alone carries the label; the way back keeps the
    source's label. Each way forward takes `steps`
    steps; the way back about `steps` a unit of depth, and at least one between two depths. Raises UserError for a path
    that does not start from Gaussian noise.
    """
    require_path("depth", path)
    levels, sources, how = len(told), len(x0), {"solver": solver, "batch_size": batch_size}
    turning, forwards_back = [], 0
    x, reached = x0, 0.0
    labels = source.expand(sources, -1)
    for d in depths.tolist():
        if d > reached:
            part, back = max(1, round(steps * (d - reached))), (1 - reached, 1 - d)
            x, forwards, _ = _carry(field, x, x0, labels, None, interval=back, steps=part, **how)
            forwards_back, reached = forwards_back + forwards, d
        turning.append(x)
    frames, forwards, gradients = _carry(
        field,
        torch.cat(turning),
        x0.repeat(levels, 1, 1, 1),
        told.repeat_interleave(sources, 0),
        wanted.repeat_interleave(sources, 0),
        interval=((1 - depths).repeat_interleave(sources).to(x0), 1.0),
        steps=steps,
        **how,
    )
    frames = torch.cat([x0[None], frames.view(levels, *x0.shape)])
    return Stair(frames, round((forwards_back + forwards) / sources), round(gradients / sources))


def _carry(
    field: Field,
    start: torch.Tensor,
    x0: torch.Tensor,
    told: torch.Tensor,
    wanted: torch.Tensor | None,
    *,
    interval: Interval,
    steps: int,
    solver: str,
    batch_size: int,
) -> tuple[torch.Tensor, int, int]:
    """States at the end of an interval of rows that start at its beginning, guided toward `wanted` or not at all, and
    forwards and gradients, summed over the rows."""
    begin, end = (torch.as_tensor(at, device=start.device).expand(len(start)) for at in interval)
    ends, forwards, gradients = [], 0, 0
    for rows in torch.arange(len(start), device=start.device).split(batch_size):
        result = integrate(
            field.plain if wanted is None else field.velocity(wanted[rows]),
            start[rows],
            field.condition(x0[rows], told[rows]),
            steps=steps,
            solver=solver,
            interval=(begin[rows], end[rows]),
        )
        ends.append(result.states[-1])
        forwards += result.nfe * len(rows)
        gradients += result.gradients * len(rows)
    return torch.cat(ends), forwards, gradients


def condition_for(levels: torch.Tensor, grid: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """Conditions c(s) (K,) for levels s (K,): what to tell the network so that s is reached.

    `reached` (G,) is the level (a guide's mean probability, say) that images have when the network is told `grid` (G,),
    which rises from 0 to 1; it is made monotone by isotonic regression and inverted. What c = 0 and c = 1 give is
    level 0 and level 1 by definition, however unsure a guide is of them, so that no two levels are told the same.
    """
    rising = torch.from_numpy(IsotonicRegression().fit_transform(grid.double().numpy(), reached.double().numpy()))
    rising = rising.clamp(0, 1)
    rising[0], rising[-1] = 0, 1
    rising = rising + 1e-6 * torch.linspace(0, 1, len(grid), dtype=torch.float64)  # flat stretches keep an inverse
    at = torch.searchsorted(rising, levels.double()).clamp(1, len(grid) - 1)
    share = (levels.double() - rising[at - 1]) / (rising[at] - rising[at - 1])
    told = torch.lerp(grid.double()[at - 1], grid.double()[at], share.clamp(0, 1))
    return torch.where(levels == 1, torch.ones_like(told), told).float()


def equidistant_levels(grid: torch.Tensor, distances: torch.Tensor, num: int) -> torch.Tensor:
    """`num` levels, the last one 1, between which a distance is equal; `distances` (G,) is how far level grid[i + 1]
    lies from grid[i] (G + 1,), which rises from 0 to 1."""
    travelled = torch.cat([torch.zeros(1), distances.cumsum(0)]).double()
    wanted = travelled[-1] * torch.arange(1, num + 1, dtype=torch.float64) / num
    at = torch.searchsorted(travelled, wanted).clamp(1, len(grid) - 1)
    share = (wanted - travelled[at - 1]) / (travelled[at] - travelled[at - 1]).clamp_min(1e-12)
    levels = torch.lerp(grid.double()[at - 1], grid.double()[at], share.clamp(0, 1)).float()
    levels[-1] = 1
    return levels

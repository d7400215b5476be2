"""A flow learns: two-dimensional toys through the real paths, coupling, loss and solver, judged by their samples."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_flow import sample

from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config import registry
from cellflux_bridge.flow.task import velocity_error
from cellflux_bridge.transport.integrate import integrate
from cellflux_bridge.velocity.base import sinusoidal

_UPDATES = 300


def draw(classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Points (B, 2, 1, 1): class 0 is a blob left of the origin, class 1 a ring around a point right of it."""
    num = len(classes)
    angle = 2 * math.pi * torch.rand(num, generator=generator)
    ring = torch.stack([0.7 + 0.6 * angle.cos(), 0.6 * angle.sin()], dim=1)
    centre = torch.where(classes[:, None] == 1, ring, torch.tensor([-0.8, 0.0]))
    return (centre + 0.08 * torch.randn(num, 2, generator=generator)).view(num, 2, 1, 1)


class Velocity(nn.Module):
    """A small perceptron of state, time and target class."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, t, x, cond):
        classes = F.one_hot(cond.target_class, 2).float()
        return self.net(torch.cat([x.flatten(1), sinusoidal(t / 100, 8), classes], dim=1)).view_as(x)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced Wasserstein-1 distance of two clouds (N, 2, 1, 1), over 16 directions."""
    angles = torch.linspace(0, math.pi, 17)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    of_a, of_b = ((x.flatten(1) @ directions).sort(0).values for x in (a, b))
    return (of_a - of_b).abs().mean().item()


@pytest.mark.parametrize("name", ["straight", "noised_source", "gaussian_source"])
def test_a_flow_learns_both_ways_between_two_classes(name):
    generator = torch.Generator().manual_seed(0)
    path = registry.build("path", {"name": name})
    coupling = registry.build("coupling", {"name": "minibatch_ot", "cost": "pixels"})
    torch.manual_seed(0)
    model = Velocity()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _UPDATES)
    for _ in range(_UPDATES):
        target = torch.randint(0, 2, (128,), generator=generator)
        x0, x1 = draw(1 - target, generator), draw(target, generator)
        i, j = coupling.pair(*map(coupling.features, (x0, x1)), blocks=target, generator=generator)
        t = path.times(len(target), generator=generator)
        x_t, u_t = sample(path, x0[i], x1[j], t, generator)
        loss = velocity_error(model(t, x_t, Condition(target_class=target[j])), u_t, torch.ones_like(t))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    for target in (0, 1):
        classes = torch.full((1000,), target)
        x0, real = draw(1 - classes, generator), draw(classes, generator)
        start = path.start(x0, torch.randn(x0.shape, generator=generator))
        with torch.no_grad():
            end = integrate(model, start, Condition(target_class=classes), steps=20).states[-1]
        assert distance(end, real) < 0.2  # .4 for all samples in the middle of the ring
        assert distance(x0, real) > 0.8

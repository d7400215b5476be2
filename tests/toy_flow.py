"""Flows in closed form, or without a network, for tests of transport methods."""

import torch

from cellflux_bridge.condition.base import Condition
from cellflux_bridge.field.classifier_guided import ClassifierGuided
from cellflux_bridge.path.brownian import Brownian
from cellflux_bridge.path.noised_source import NoisedSource
from cellflux_bridge.path.smooth import Smooth
from cellflux_bridge.path.straight import Straight
from cellflux_bridge.transport.base import Flow, source_noise

FROM_DATA = {
    "straight": Straight(),
    "noised_source": NoisedSource(scale=0.5),
    "brownian": Brownian(scale=0.5, margin=0.03),
    "smooth": Smooth(scale=0.5),
}


def two_classes(levels: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - levels, levels], dim=-1)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def drawn_to_level(t, x, cond):
    """dx/dt = -2 (x - c), whose solution comes from x to c + (x - c) exp(-2 t)."""
    return -2 * (x - column(cond.level[:, 1]))


def sources(num: int = 5) -> torch.Tensor:
    return torch.randn(num, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def sample(path, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, generator: torch.Generator):
    """States and targets of a path, with the noise that it draws."""
    return path.sample(x0, x1, t, path.draw_noise(x0.shape, generator=generator).to(x0))


def noise_of(num: int = 5) -> torch.Tensor:
    return source_noise((3, 4, 4), [str(i) for i in range(num)], seed=1)


class Recorded:
    """A velocity that notes its calls."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, t, x, cond):
        self.calls.append((t, x, cond))
        return self.velocity(t, x, cond)


def flow_of(path, velocity, guided=None, *, batch_size: int = 64, source: float = 0.0) -> Flow:
    """A flow between two classes whose condition is the level and the source image. `guided(targets)` is its guided
    velocity, else the plain one; `source` is the level that stands for the source's label."""
    return Flow(
        path=path,
        by_level=True,
        reaches_source=True,
        is_guided=guided is not None,
        batch_size=batch_size,
        labels=lambda levels: two_classes(torch.where(levels == 0, source, levels)),
        condition=lambda x0, labels, of: Condition(level=labels, source_image=x0),
        plain=velocity,
        field=guided or (lambda targets: velocity),
    )


def mixing(t, x, cond):
    """A velocity without closed form in which all pixels of a sample matter to each other."""
    return torch.sin(3 * x + column(t)) - x.mean((1, 2, 3), keepdim=True) * column(cond.level[:, 1]) + cond.source_image


def guide(x, t=None, x0=None):
    logits = torch.stack([x[:, 0].mean((1, 2)), (x[:, 1] ** 2).mean((1, 2))], dim=1)
    return (3 * logits).log_softmax(1)


def steered(form: str, path, velocity=mixing):
    return lambda targets: ClassifierGuided(velocity, [guide], path, targets, form=form, weight=0.5, start=0.05)

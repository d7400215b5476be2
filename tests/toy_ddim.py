"""A small DDIM stair of which everything is known, written out a second time, for the tests of DDIM stairs."""

import numpy as np
import torch
from torch import nn

from cellflux_bridge.ddim.schedule import respaced
from cellflux_bridge.ddim.settings import ADMConfig
from cellflux_bridge.ddim.stairs import ddim_stairs
from cellflux_bridge.ddim.steps import NoisePredictor

SIDE = 8
TINY = ADMConfig(channels=32, multipliers=(1, 1), attention=(8,), head_channels=16)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shuffled(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """ADM's networks start with zeros at their ends; these do not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


# A smooth network and a classifier of whom everything is known, in float64.
_MIX, _SHIFT = 0.1 * random(3, 3, seed=1), 0.4 * random(3, 3, seed=2)
_WEIGHTS = 0.02 * random(2, 3 * SIDE * SIDE, seed=3)


def toy_eps(x, tau, y):
    angle = torch.einsum("cd,bdhw->bchw", _MIX, x) + _SHIFT[y][:, :, None, None]
    return torch.sin(angle + tau[:, None, None, None].double() / 300)


def toy_classifier(x, tau):
    return x.flatten(1) @ _WEIGHTS.T * (1 + tau[:, None].double() / 500)


def toy_gradient(x: np.ndarray, tau: int, y: int) -> np.ndarray:
    """grad log softmax in closed form, for one image."""
    weights = _WEIGHTS.numpy() * (1 + tau / 500)
    logits = weights @ x.ravel()
    p = np.exp(logits - logits.max())
    return (weights[y] - (p / p.sum()) @ weights).reshape(x.shape)


def written_out(x0, source, target, depths, *, timesteps, scale, eps=toy_eps, gradient=toy_gradient):
    """One image's stair, straight from the method page's equations: nothing shared, every decode by itself."""
    step = 1000 // timesteps
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar = {k: products[step * k] for k in range(timesteps)} | {-1: 1.0, timesteps: 0.0}

    def noise(z, k, y):
        tau = torch.tensor([step * k])
        return eps(torch.from_numpy(z)[None], tau, torch.tensor([y]))[0].numpy().astype(np.float64)

    z, encoded = x0.numpy().astype(np.float64), {}
    for k in range(max(depths)):
        e = noise(z.astype(x0.numpy().dtype), k, source)
        x = (z - np.sqrt(1 - abar[k]) * e) / np.sqrt(abar[k])
        z = np.sqrt(abar[k + 1]) * x + np.sqrt(1 - abar[k + 1]) * e
        encoded[k + 1] = z
    frames = [x0.numpy()]
    for depth in depths:
        u = encoded[depth]
        for k in range(depth - 1, -1, -1):
            state = u.astype(x0.numpy().dtype)
            e = noise(state, k, target) - np.sqrt(1 - abar[k]) * scale * gradient(state, step * k, target)
            x = (u - np.sqrt(1 - abar[k]) * e) / np.sqrt(abar[k])
            u = np.sqrt(abar[k - 1]) * x + np.sqrt(1 - abar[k - 1]) * e
        frames.append(u)
    return np.stack(frames)


def toy_stairs(x0, depths, *, timesteps=20, scale=2.0, source=None, target=None, classifier=toy_classifier, **options):
    num = len(x0)
    return ddim_stairs(
        x0,
        torch.zeros(num, dtype=torch.long) if source is None else source,
        torch.ones(num, dtype=torch.long) if target is None else target,
        schedule=respaced(timesteps),
        encoder=NoisePredictor(toy_eps),
        decoder=NoisePredictor(toy_eps),
        depths=depths,
        classifier=classifier,
        scale=scale,
        **options,
    )

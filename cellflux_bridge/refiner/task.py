"""Denoising of real patches with small noise, as a training task."""

from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn

from cellflux_bridge import images
from cellflux_bridge.base.seeds import derive_seed, numpy_generator, torch_generator
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.perceptual.nuclei import NucleiLoss
from cellflux_bridge.refiner.model import FINEST, build_refiner, noise_in


class NoisyBatch(NamedTuple):
    """Patches (B, C, H, W) uint8, and the noise that they get: its standard deviation (B,), and itself (B, C, H, W) of
    standard deviation 1."""

    x: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor


class RefinerTask:
    """Regression of a network on the noise in training patches of all classes (Ho et al. 2020, eq. 14).

    The logarithm of the noise's standard deviation is uniform between FINEST and `refiner.scale`, evenly spread over a
    batch. A batch is of one window of its patches; validation sees whole ones, as translation does. A perceptual loss
    is of the upper two octaves of noise, which hide outlines.
    """

    def __init__(self, config: Config, patches: Patches):
        self._config, self._patches, self.preprocessing = config, patches, patches.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "refiner", "weights"))
            self.model = build_refiner(config)
        self._perceptual = NucleiLoss(config, patches) if config.perceptual.share else None
        self._window = min(config.refiner.window, config.data.image_size)
        self._train = patches.indices("train")
        val = patches.sample("val", num=config.refiner.train.validate_pairs, seed=config.seed)
        self._val = np.array_split(val, -(-len(val) // config.refiner.train.batch_size))

    def _noisy(self, x: torch.Tensor, generator: torch.Generator) -> NoisyBatch:
        share = (torch.randperm(len(x), generator=generator) + torch.rand(len(x), generator=generator)) / len(x)
        sigma = FINEST * (self._config.refiner.scale / FINEST) ** share
        return NoisyBatch(x, sigma, torch.randn(x.shape, generator=generator))

    def batch(self, index: int, *, rank: int) -> NoisyBatch:
        purpose = (self._config.seed, "refiner", index, rank)
        chosen = numpy_generator(*purpose).choice(self._train, self._config.refiner.train.batch_size)
        generator = torch_generator(*purpose)
        x = self._patches.random(chosen, flips=self._config.data.flips, generator=generator)
        top, left = (int(torch.randint(x.shape[2] - self._window + 1, (), generator=generator)) for _ in range(2))
        return self._noisy(x[..., top : top + self._window, left : left + self._window], generator)

    def loss(self, model: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        x, sigma, scale = images.encode(batch.x), batch.sigma[:, None, None, None], self._config.refiner.scale
        error = noise_in(model, x + sigma * batch.noise, batch.sigma, scale=scale).float() - batch.noise
        squared, rows = error.square().mean(), batch.sigma > scale / 4
        if self._perceptual is None or not (error.requires_grad and rows.any()):
            return squared
        gradient = -2 * (error / sigma)[rows].detach() / error.numel()
        return squared + self._perceptual((x - sigma * error)[rows], x[rows], gradient)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """The mean squared error of the noise in held-out patches; 1 is that of a guess of 0."""
        errors = []
        for number, rows in enumerate(self._val):
            generator = torch_generator(self._config.seed, "refiner", "val", number)
            batch = self._noisy(self._patches.centre(rows), generator)
            errors += [self.loss(model, move_data_to_device(batch, device)).item()] * len(rows)
        return {"val/noise_mse": float(np.mean(errors))}

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None

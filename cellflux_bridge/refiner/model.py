"""A refiner: noise on a frame, and a denoiser of small noise that takes it away again.

A flow's network draws the mean of many possible ends wherever it is unsure, and of the noise of single pixels it is
always unsure: a frame lacks the grain of the camera, and its finest edges are soft. As in SDEdit (Meng et al. 2022)
and SDXL's refiner (Podell et al. 2023) a frame gets Gaussian noise of a small standard deviation, which hides its
finest detail, and the probability flow of a diffusion model carries it back among real patches:

    dx / d sigma = E[eps | x, sigma]        (Karras et al. 2022, eq. 1, for sigma(t) = t)

from sigma = `noise_at` its level to FINEST. What is coarser than the noise stays as the flow drew it.
"""

import math

import numpy as np
import torch
from torchdiffeq import odeint

from cellflux_bridge import checkpoint, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition, ConditionSpec
from cellflux_bridge.config import Config, registry
from cellflux_bridge.training.run import require_alike
from cellflux_bridge.velocity.base import Velocity

# The folder, in that of a run, where its refiner is trained, and the sections of a configuration on which it depends.
REFINER = "refiner"
REFINER_SECTIONS = ("seed", "data", "refiner", "perceptual")
# The least noise, half a grey level, which is the most that rounding to uint8 changes.
FINEST = 0.004
# Midpoint steps are even in the cube root of the noise (Karras et al. 2022, eq. 5, rho = 3), and at most so wide: three
# from 0.2, five from 0.6 (docs/realism.md).
_RHO, _WIDEST = 3, 1 / 7


def build_refiner(config: Config) -> Velocity:
    """The (untrained) network of a configuration: `noise_in` says what it is asked.

    Raises UserError for a scale that is too small, and for a network whose stride does not divide patches and windows.
    """
    scale, side = config.refiner.scale, config.data.image_size
    if scale <= FINEST:
        raise UserError(
            f"refiner.scale={scale}: expected more than {FINEST} (half a grey level), such as 0.12, or 0 for no refiner"
        )
    network = registry.build("velocity", config.refiner.velocity, config.data.channels, ConditionSpec(()))
    for key, px in (("data.image_size", side), ("refiner.window", min(config.refiner.window, side))):
        if px % network.stride:
            raise UserError(
                f"{key}={px}: not divisible by the stride {network.stride} of refiner.velocity; choose a multiple, or "
                "fewer refiner.velocity.multipliers"
            )
    return network


def noise_in(network: Velocity, x: torch.Tensor, sigma: torch.Tensor, *, scale: float) -> torch.Tensor:
    """E[eps | x] (B, C, H, W) for x = image + sigma eps, sigma (B,) between FINEST and `scale`.

    The network's time is the logarithm of sigma, 0 at FINEST and 1 at `scale`.
    """
    t = (sigma / FINEST).log() / math.log(scale / FINEST)
    nothing = Condition(dropped=torch.ones_like(sigma, dtype=torch.bool))
    return network(t, x, nothing)


def noise_levels(sigma: float) -> np.ndarray:
    """The standard deviations of noise from `sigma` (above FINEST) to FINEST, between which one midpoint step goes."""
    ends = sigma ** (1 / _RHO), FINEST ** (1 / _RHO)
    return np.linspace(*ends, math.ceil((ends[0] - ends[1]) / _WIDEST) + 1) ** _RHO


def noise_at(level: float, *, scale: float) -> float:
    """The standard deviation of the noise on frames of a level: its variance rises evenly, from nothing on the source
    to `scale` squared at level 1, so that frames part from their source's finest detail step by step."""
    return scale * level**0.5


@torch.no_grad()
def refine(network: Velocity, frames: torch.Tensor, noise: torch.Tensor, *, sigma: float, scale: float) -> torch.Tensor:
    """Frames (B, C, H, W) uint8 with their finest detail drawn anew by standard normal `noise` of the same shape, of
    which they get `sigma` times; all on the network's device. A frame does not depend on the others of its batch.
    UserError where the network's output is not finite."""
    sigmas = noise_levels(sigma)
    x = images.encode(frames) + sigma * noise

    def rate(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return noise_in(network, x, sigma.expand(len(x)), scale=scale).float()

    found = odeint(rate, x, torch.from_numpy(sigmas).to(x), method="midpoint")[-1]
    if not found.isfinite().all():
        raise UserError(
            "the refiner made values that are not finite; train it again with a lower refiner.train.lr, or set "
            "translate.refine=false"
        )
    return images.decode(found)


class Refiner:
    """The refiner of a run. `name` changes with its weights.

    Raises UserError where it was trained with another configuration than the run's.
    """

    def __init__(self, config: Config, device: torch.device):
        folder = checkpoint.latest(config.output / REFINER)
        trained = checkpoint.read_config(folder)
        require_alike(folder, trained, config, uses=REFINER_SECTIONS, ignore=("refiner.train",))
        network = checkpoint.load_network(folder, lambda: build_refiner(config))
        self.name = f"refiner@{checkpoint.step_of(folder)}:{checkpoint.weights_digest(network)[:16]}"
        self._scale = config.refiner.scale
        self._network = network.to(device, memory_format=torch.channels_last).eval()

    def forwards(self, level: float) -> int:
        """How many forwards of its network a frame of a level takes."""
        sigma = noise_at(level, scale=self._scale)
        return 2 * (len(noise_levels(sigma)) - 1) if sigma > FINEST else 0

    def __call__(self, frames: torch.Tensor, noise: torch.Tensor, *, level: float) -> torch.Tensor:
        """Frames of a level: see `refine`."""
        sigma = noise_at(level, scale=self._scale)
        return refine(self._network, frames, noise, sigma=sigma, scale=self._scale) if sigma > FINEST else frames

"""The networks of DDIM stairs as training tasks: the denoiser, and the classifier of noised images."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.config import Config
from cellflux_bridge.data.balanced import BalancedPatches
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.ddim.networks import Denoiser, NoisyClassifier
from cellflux_bridge.ddim.schedule import NUM_STEPS, add_noise
from cellflux_bridge.ddim.settings import ADMConfig
from cellflux_bridge.ddim.variational import VLB_WEIGHT, step_bound

_VALIDATION_CHUNK = 64
# Steps of the noise schedule at which the classifier's accuracy is reported.
_REPORTED_STEPS = (0, 100, 250, 500, 750)


class NoisyBatch(NamedTuple):
    """Clean images x0 and unit noise (B, C, H, W), steps tau (B,) in 0..999, classes y and y_seen (B,).

    `y_seen` is the class that conditions the denoiser: y, or the null class where it is dropped.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    tau: torch.Tensor
    y: torch.Tensor
    y_seen: torch.Tensor

    @property
    def x_t(self) -> torch.Tensor:
        return add_noise(self.x0, self.noise, self.tau)

    def to(self, device: torch.device) -> "NoisyBatch":
        return NoisyBatch(*(value.to(device) for value in self))


def build_denoiser(config: Config, size: ADMConfig | None = None) -> Denoiser:
    """The (untrained) denoiser of a resolved configuration; with `size` one of this size instead of its own."""
    ddim = config.ddim
    options = {"learn_sigma": ddim.learn_sigma, "has_null": ddim.guidance == "classifier_free"}
    return Denoiser(size or ddim.denoiser, **options, **_of_data(config))


def build_noisy_classifier(config: Config) -> NoisyClassifier:
    """The (untrained) noisy classifier of a resolved configuration."""
    return NoisyClassifier(config.ddim.classifier, **_of_data(config))


def _of_data(config: Config) -> dict[str, int]:
    data = config.data
    return {"image_size": data.image_size, "num_classes": len(data.classes), "channels": data.channels}


class _NoisyTask:
    """Noised patches: class-balanced and random to train on, the middles of held-out ones to validate on.

    `key` names the network's settings in `ddim`, `purpose` its draws; `build` makes the network; `unused` are the keys
    of `ddim` that this training does not use.
    """

    key: str
    purpose: str
    build: Callable[[Config], nn.Module]
    uses = ("seed", "data", "ddim")
    unused: tuple[str, ...] = ("ddim.timesteps", "ddim.depths", "ddim.scale", "ddim.weight", "ddim.source_denoiser")

    def __init__(self, config: Config, patches: Patches):
        self.model, self.preprocessing = self.build(config), patches.preprocessing
        self._ddim, self._patches, self._seed = config.ddim, patches, config.seed
        self._train = self.settings(config).train
        self._balanced = BalancedPatches(patches, patches.indices("train"), data=config.data)
        if len(patches.indices("val")) == 0:
            raise UserError("the val split is empty; raise data.split.val or name splits in the data")

    @classmethod
    def settings(cls, config: Config) -> ADMConfig:
        return getattr(config.ddim, cls.key)

    def batch(self, index: int, *, rank: int) -> NoisyBatch:
        generator = torch_generator(self._seed, self.purpose, index, rank)
        num, null_class = self._train.batch_size, getattr(self.model, "null_class", None)
        jitter = torch_generator(self._seed, self.purpose, "stain", index, rank)
        x0, y, _ = self._balanced.draw(num, generator=generator, jitter=jitter)
        tau = torch.randint(NUM_STEPS, (num,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(num, generator=generator) < self._ddim.class_dropout
        return NoisyBatch(x0, noise, tau, y, y if null_class is None else torch.where(dropped, null_class, y))

    def _held_out(self, device: torch.device, *, tau: int | None = None) -> Iterator[NoisyBatch]:
        """Patches of the val split, the same on every call; all at one step, or at evenly spread ones."""
        chosen = self._patches.sample("val", num=self._train.validate_pairs, seed=self._seed)
        spread = torch.linspace(0, NUM_STEPS - 1, len(chosen)).long()
        for start in range(0, len(chosen), _VALIDATION_CHUNK):
            part = chosen[start : start + _VALIDATION_CHUNK]
            x0 = images.encode(self._patches.centre(part))
            generator = torch_generator(self._seed, self.purpose, "val", start)
            steps = spread[start : start + len(part)] if tau is None else torch.full((len(part),), tau)
            y = torch.from_numpy(self._patches.labels[part])
            yield NoisyBatch(x0, torch.randn(x0.shape, generator=generator), steps, y, y).to(device)

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None  # a stair takes hundreds of evaluations an image


class DenoiserTask(_NoisyTask):
    """Regression of eps on the noise in x_tau, tau uniform over the 1000 steps (L_simple of DDPM, Ho et al. 2020).

    With `ddim.learn_sigma` the bound that trains the variance is added (L_hybrid, Nichol & Dhariwal 2021, eq. 16).
    For classifier-free guidance a share `ddim.class_dropout` of the samples gets the null class (Ho & Salimans 2022).
    """

    key, purpose, build = "denoiser", "denoiser", staticmethod(build_denoiser)
    unused = (*_NoisyTask.unused, "ddim.classifier")

    def loss(self, model: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        x_t = batch.x_t
        output = model(x_t, batch.tau, batch.y_seen).float()
        if not self._ddim.learn_sigma:
            return F.mse_loss(output, batch.noise)
        eps, v = output.chunk(2, dim=1)
        return F.mse_loss(eps, batch.noise) + VLB_WEIGHT * step_bound(batch.x0, x_t, batch.tau, eps, v)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """On held-out patches: the noise's mean squared error, over all steps and over each third of them, and the
        relative change of eps by another class ("class swap"; near 0: the class is ignored)."""
        rows = []
        for batch in self._held_out(device):
            x_t = batch.x_t
            eps = model.eps(x_t, batch.tau, batch.y).float()
            other = model.eps(x_t, batch.tau, (batch.y + 1) % len(self._patches.classes)).float()
            squares = [difference.square().mean((1, 2, 3)) for difference in (eps - batch.noise, other - eps, eps)]
            rows.append(torch.stack([*squares, batch.tau * 3 // NUM_STEPS]).cpu())
        error, moved, size, third = torch.cat(rows, dim=1)
        thirds = {
            f"val/noise_mse_{name}": error[third == number].mean().item()
            for number, name in enumerate(("early", "middle", "late"))
            if (third == number).any()
        }
        swap = (moved.sum() / size.sum().clamp_min(1e-12)).sqrt().item()
        return {"val/noise_mse": error.mean().item(), **thirds, "val/class_swap": swap}


class NoisyClassifierTask(_NoisyTask):
    """Cross-entropy of the class of x_tau, tau uniform over the 1000 steps (ADM, Dhariwal & Nichol 2021, sec. 4)."""

    key, purpose, build = "classifier", "noisy classifier", staticmethod(build_noisy_classifier)
    unused = (*_NoisyTask.unused, "ddim.denoiser", "ddim.learn_sigma", "ddim.class_dropout")

    def loss(self, model: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        return F.cross_entropy(model(batch.x_t, batch.tau).float(), batch.y)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Accuracy on held-out patches at a few steps of the schedule."""

        def is_right(tau: int) -> torch.Tensor:
            batches = self._held_out(device, tau=tau)
            return torch.cat([model(batch.x_t, batch.tau).argmax(1) == batch.y for batch in batches])

        return {f"val/accuracy_tau{tau}": is_right(tau).float().mean().item() for tau in _REPORTED_STEPS}


# The folder of a run that a training writes to -> the training, in their order.
STAGES: dict[str, type[_NoisyTask]] = {"denoiser": DenoiserTask, "noisy_classifier": NoisyClassifierTask}


def used_stages(config: Config) -> list[str]:
    """The trainings that a configuration asks for: not those whose weights are given, nor a classifier without use."""
    names = STAGES if config.ddim.guidance == "classifier" else ("denoiser",)
    return [name for name in names if STAGES[name].settings(config).weights is None]


def refuse_unfit(config: Config) -> None:
    """UserError for what can be seen to be wrong before patches are read."""
    if not used_stages(config):
        raise UserError("ddim: the weights of every network are given; there is nothing to train")
    for key in ("accelerator", "devices", "num_nodes", "strategy", "precision"):
        if getattr(config.ddim.denoiser.train, key) != getattr(config.ddim.classifier.train, key):
            raise UserError(
                f"ddim.classifier.train.{key}: both networks are trained by the same processes; "
                "give it the value of ddim.denoiser.train"
            )
    if config.data.classes is not None:
        with torch.device("meta"):
            build_denoiser(config)
            build_noisy_classifier(config)

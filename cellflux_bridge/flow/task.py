"""Flow matching as a training task."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.functional import cosine_similarity

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.seeds import torch_generator
from cellflux_bridge.codec.base import build_codec
from cellflux_bridge.condition.base import Condition, ConditionSpec
from cellflux_bridge.config import Config
from cellflux_bridge.data.pairs import PairBatch, build_pairs
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.perceptual.nuclei import NucleiLoss
from cellflux_bridge.transport.base import source_noise
from cellflux_bridge.transport.path import Path as PathTransport
from cellflux_bridge.velocity.base import late_weight

_SHEET_ROWS, _SHEET_STEPS, _SHEET_FRAMES = 8, 12, 7
_LEAST_LEFT = 1e-3  # of the way, by which errors are divided


class FlowDraw(NamedTuple):
    """What is drawn for a batch and travels to the device: pairs of uint8 patches, times t (B,), the path's noise
    (B, C, H, W) in the shape of states, and in training which samples lose their condition, (B,) bool, and which lose
    one of its P optional parts, (P, B) bool."""

    pairs: PairBatch
    t: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor | None = None
    absent: torch.Tensor | None = None


class FlowBatch(NamedTuple):
    """t (B,), x_t and u_t (B, C, H, W), and the condition with its dropped samples marked."""

    t: torch.Tensor
    x_t: torch.Tensor
    u_t: torch.Tensor
    cond: Condition


class FlowTask:
    """Regression of v(t, x_t, cond) on u_t (conditional flow matching).

    `levels` (N, num_classes) are the patches' soft labels where the condition is a level (see `flow.levels`), by
    default their classes.
    """

    def __init__(self, config: Config, patches: Patches, *, levels: np.ndarray | None = None):
        if config.pairs.self_pairs and config.condition.target != "level":
            raise UserError(
                f"pairs.self_pairs={config.pairs.self_pairs}: is of levels and has no part in condition.target="
                f"{config.condition.target}; set pairs.self_pairs=0 (pairs.identity=true makes a class its own target, "
                "too), or target=level"
            )
        if levels is None and config.condition.target == "level":
            levels = np.eye(len(patches.classes), dtype=np.float32)[patches.labels]
        self._config, self.preprocessing = config, patches.preprocessing
        self.codec = build_codec(config)
        self.path, self.model = build_flow(config)
        self.model.prepare()
        self._perceptual = self._build_perceptual(config, patches) if config.perceptual.share else None
        train, val_size = config.train, min(config.train.batch_size, 64)
        options = {"seed": config.seed, "levels": levels}
        self._train = build_pairs(config, patches, split="train", batch_size=train.batch_size, **options)
        self._val = build_pairs(config, patches, split="val", batch_size=val_size, **options)
        self._num_val_batches = -(-train.validate_pairs // val_size)
        self.unmatched = self._train.unmatched

    def _encoded(self, pairs: PairBatch) -> PairBatch:
        x0, x1 = map(self.codec.to(pairs.x0.device).encode, pairs.patches())
        return pairs._replace(x0=x0, x1=x1)

    def _build_perceptual(self, config: Config, patches: Patches) -> NucleiLoss:
        if not self.path.straight:
            raise UserError(
                f"perceptual.share={config.perceptual.share:g}: looks at ends to which velocities lead straight, but "
                f"path.name={config.path['name']} is not straight; use noised_source, or set perceptual.share=0"
            )
        return NucleiLoss(config, patches, self._decoded)

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        return self.codec.to(x.device).decode(x)

    def _draw(self, pairs: PairBatch, *purpose: str | int) -> FlowDraw:
        generator, (num, _, *sides) = torch_generator(self._config.seed, "path", *purpose), pairs.x0.shape
        t = self.path.times(num, generator=generator)
        shape = (num, self.codec.channels, *(side // self.codec.stride for side in sides))
        return FlowDraw(pairs, t, self.path.draw_noise(shape, generator=generator))

    def batch(self, index: int, *, rank: int) -> FlowDraw:
        drawn = self._draw(self._train.batch(index, rank=rank), "train", index, rank)
        generator = torch_generator(self._config.seed, "condition dropout", index, rank)
        share, optional = self._config.condition.dropout, self.model.spec.dropped_alone
        dropped = torch.rand(len(drawn.t), generator=generator) < share
        absent = torch.rand(len(optional), len(dropped), generator=generator) < share if optional else None
        return drawn._replace(dropped=dropped, absent=absent)

    def states(self, drawn: FlowDraw) -> FlowBatch:
        """The states of a batch, on the device where it lies."""
        pairs, t = self._encoded(drawn.pairs), drawn.t
        cond = self.model.spec.read(pairs._asdict())
        cond = cond if drawn.dropped is None else cond.drop(drawn.dropped)
        if drawn.absent is not None:
            for part, mask in zip(self.model.spec.dropped_alone, drawn.absent, strict=True):
                cond = cond.without(part, mask)
        return FlowBatch(t, *self.path.sample(pairs.x0, pairs.x1, t, drawn.noise), cond)

    def validation_batches(self, device: torch.device) -> Iterator[FlowBatch]:
        """Held-out pairs, the same on every call; drawn anew, so that large patches do not lie in memory."""
        for number in range(self._num_val_batches):
            yield self.states(move_data_to_device(self._draw(self._val.batch(number), "val", number), device))

    def loss(self, model: nn.Module, batch: FlowDraw) -> torch.Tensor:
        batch = self.states(batch)
        v, weight = model(batch.t, batch.x_t, batch.cond).float(), self.model.error_weight(batch.t)
        return velocity_error(v, batch.u_t, weight) + self.perceptual_loss(v, batch)

    def perceptual_loss(self, v: torch.Tensor, batch: FlowBatch) -> torch.Tensor | float:
        """The loss of velocities v (B, C, H, W) that looks at the ends to which they lead, where one is asked for; its
        value is 0. Its gradient is compared with that of the squared error of predict=endpoint, whatever the network
        predicts: that of others has no bound at the end of the way."""
        rows = batch.t > self._config.perceptual.after
        if self._perceptual is None or not rows.any():
            return 0.0
        left = (1 - batch.t[rows]).clamp_min(_LEAST_LEFT)[:, None, None, None]
        made, real = (batch.x_t[rows] + left * to[rows] for to in (v, batch.u_t))
        weight = (2 * late_weight(batch.t[rows]) / v.numel())[:, None, None, None]
        return self._perceptual(made, real, weight * (v - batch.u_t)[rows].detach() / left)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """On held-out pairs: the velocity's mean squared error and the share of u_t's power that it explains; and what
        the condition does where it is exchanged (see `_swapped`).

        "condition swap" is how far the output moves then, relative to its norm. Over pairs whose condition becomes
        another, "condition cosine" is the mean cosine of both outputs, and "condition gain" how much the error rises,
        relative to the error, with its standard error over pairs: 0 for a network that ignores its condition.
        """
        squares, rises, cosines = [], [], []
        for t, x_t, u_t, cond in self.validation_batches(device):
            swapped = _swapped(self.model.spec, cond)
            v, other = model(t, x_t, cond).float(), model(t, x_t, swapped).float()
            weight = self.model.error_weight(t)[:, None, None, None].sqrt()
            parts = (weight * (v - u_t), weight * u_t, weight * (other - v), weight * v)
            squares.append([part.square().mean().item() for part in parts])
            differs = _differs(self.model.spec, cond, swapped)
            rise = (weight * (other - u_t)).square().mean((1, 2, 3)) - parts[0].square().mean((1, 2, 3))
            rises.append(rise[differs])
            cosines.append(cosine_similarity(v.flatten(1), other.flatten(1))[differs])
        error, power, moved, size = np.mean(squares, axis=0).tolist()
        found = {
            "val/velocity_mse": error,
            "val/velocity_explained": 1 - error / power,
            "val/condition_swap": (moved / max(size, 1e-12)) ** 0.5,
        }
        rise = torch.cat(rises)
        if len(rise) < 2:  # all pairs have one condition
            return found
        return found | {
            "val/condition_cosine": torch.cat(cosines).mean().item(),
            "val/condition_gain": rise.mean().item() / max(error, 1e-12),
            "val/condition_gain_error": rise.std().item() / len(rise) ** 0.5 / max(error, 1e-12),
        }

    def sheet(self, model: nn.Module, device: torch.device) -> np.ndarray | None:
        """Held-out sources carried along the path: rows are sources, the last column is their coupled target."""
        if not self.path.from_data:
            return None
        pairs = self._val.batch(0)._asdict()
        # Rows come in blocks, one a transition; a stride shows all of them.
        rows = torch.linspace(0, len(pairs["x0"]) - 1, min(_SHEET_ROWS, len(pairs["x0"]))).long()
        chosen = {name: value[rows].to(device) for name, value in pairs.items() if value is not None}
        chosen = self._encoded(PairBatch(**chosen))
        names = [str(i) for i in chosen.source_index.tolist()]
        transport = PathTransport(steps=_SHEET_STEPS, frames=_SHEET_FRAMES, solver="euler")
        result = transport.along(
            model,
            self.path,
            chosen.x0,
            self.model.spec.read(chosen._asdict()),
            noise=source_noise(chosen.x0.shape[1:], names, seed=self._config.seed).to(device),
        )
        states = torch.cat([result.frames, chosen.x1[None]]).transpose(0, 1)
        table = images.to_rgb(self.codec.to_uint8(states).cpu().numpy().transpose(0, 1, 3, 4, 2))
        return images.sheet(table, scale=max(1, 96 // table.shape[2]))


def velocity_error(v: torch.Tensor, u_t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean squared error of velocities (B, C, H, W), weighted by (B,): the loss of conditional flow matching."""
    return (weight * (v - u_t).square().mean((1, 2, 3))).mean()


IGNORED = (
    "WARNING: the network ignores its condition, as far as validation shows: where targets are exchanged its error "
    "rises by {condition_gain:.2%} +- {condition_gain_error:.2%}, which is no more than chance. Train longer, validate "
    "more pairs (train.validate_pairs), or see whether the classes differ at all"
)


def ignores_condition(figures: Mapping[str, float]) -> bool:
    """Whether a validation shows no more than chance (two standard errors) that the condition is used."""
    return figures.get("val/condition_gain", 1.0) <= 2 * figures.get("val/condition_gain_error", 0.0)


def _swapped(spec: ConditionSpec, cond: Condition) -> Condition:
    """Source and target class change places; otherwise levels are mirrored, or samples get one another's targets."""
    parts = [part.name for part in spec.parts if part.of_target]
    if parts == ["target_class"] and cond.source_class is not None:
        return cond.replace(target_class=cond.source_class, source_class=cond.target_class)
    if parts == ["level"]:
        return cond.replace(level=cond.level.flip(1))
    if not parts:
        return cond
    columns = torch.cat([cond.tensors[name].view(len(cond), -1).float() for name in parts], dim=1)
    number = columns.unique(dim=0, return_inverse=True)[1]
    order, inverse = number.argsort(stable=True), torch.empty_like(number)
    inverse[order] = order.roll(-int(number.bincount().max()))  # past all samples of one condition
    return cond.permuted(parts, inverse)


def _differs(spec: ConditionSpec, cond: Condition, other: Condition) -> torch.Tensor:
    """Which samples (B,) bool have another target in another condition."""
    parts = [part.name for part in spec.parts if part.of_target]
    found = [(cond.tensors[name] != other.tensors[name]).view(len(cond), -1).any(1) for name in parts]
    return torch.stack(found).any(0) if found else torch.zeros(len(cond), dtype=torch.bool)

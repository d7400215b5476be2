"""Shortcuts: a copy of the flow's network that is told the length of a step, so that a way takes one to four forwards.

As in shortcut models (Frans et al. 2024, arXiv 2410.12557) the network learns the mean velocity s(x, t, d) over a step,
so that x + d s(x, t, d) is the state at t + d, from its own steps of half that length (eq. 4):

    s(x, t, 2d) = (s(x, t, d) + s(x', t + d, d)) / 2        with x' = x + d s(x, t, d)

The shortest steps learn from two midpoint steps of the flow itself. Three quarters of every batch are flow matching, as
in that paper: without them the network drifts away from what the flow knows (docs/realism.md). The flow's network stays
as it is: inversion and guidance need the velocity at one moment.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replace_text
from cellflux_bridge.base.seeds import derive_seed, torch_generator
from cellflux_bridge.condition.base import Condition, Names, Part
from cellflux_bridge.config import Config
from cellflux_bridge.data.patches import Patches
from cellflux_bridge.flow.network import FLOW_SECTIONS, build_flow
from cellflux_bridge.flow.task import FlowBatch, FlowDraw, FlowTask, velocity_error
from cellflux_bridge.training.run import require_alike
from cellflux_bridge.velocity.base import Velocity

# The folder, in that of a run, where its shortcuts are trained, and the sections of a configuration on which they
# depend.
SHORTCUT = "shortcut"
SHORTCUT_SECTIONS = (*FLOW_SECTIONS, "shortcut")
# The share of a batch that learns steps, and the length that the embedding reads for none.
_SHARE, _NO_LENGTH = 0.25, 2.0**-7
# There: the digest of the flow's weights from which they learn.
_FLOW = "flow.txt"


class StepLength(Part):
    """The length of a step (B,), 0 for the velocity at one moment; its binary logarithm as a vector that begins at
    zero. Samples have none of their own: `mean_velocity` puts it into their condition."""

    name = "step"

    def read(self, fields):
        return torch.ones_like(fields["x0"][:, 0, 0, 0])

    def embedding(self, width):
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return _Logarithm(nn.Linear(1, width), nn.SiLU(), last)


class _Logarithm(nn.Sequential):
    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return super().forward(step.float().clamp_min(_NO_LENGTH).log2()[:, None])


def build_shortcut(config: Config) -> Velocity:
    """The (untrained) network of shortcuts: the flow's, told the length of a step, too. UserError for a path that does
    not begin at time 0."""
    path, network = build_flow(config, StepLength(Names(()), 0))
    if path.t_start != 0:
        raise UserError(
            f"shortcut.steps: path {config.path['name']} begins at t = {path.t_start}; use one that begins at 0, such "
            "as noised_source, or shortcut.steps=0"
        )
    return network


def mean_velocity(network: Callable, step: torch.Tensor, t: torch.Tensor, x: torch.Tensor, cond: Condition):
    """The mean velocity (B, C, H, W) over steps of lengths `step` (B,) from times t (B,)."""
    return network(t, x, cond.replace(step=step))


def along(x: torch.Tensor, step: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """States (B, C, H, W) after steps of lengths (B,)."""
    return x + step.view(-1, 1, 1, 1) * velocity


class Shortcut:
    """The shortcuts of a run whose flow has weights of a digest. `name` changes with their own weights.

    Raises UserError where they were trained with another configuration than the run's, or from another flow.
    """

    def __init__(self, config: Config, flow: str, device: torch.device):
        folder = checkpoint.latest(config.output / SHORTCUT)
        trained = checkpoint.read_config(folder)
        require_alike(folder, trained, config, uses=SHORTCUT_SECTIONS, ignore=("shortcut.train",))
        require_same_flow(config.output, flow)
        network = checkpoint.load_network(folder, lambda: build_shortcut(trained))
        self.name = f"shortcut@{checkpoint.step_of(folder)}:{checkpoint.weights_digest(network)[:16]}"
        self.steps = trained.shortcut.steps
        self._network = network.to(device, memory_format=torch.channels_last).eval()

    def __call__(self, num: int) -> Callable:
        """The velocity v(t, x, cond) of a way in `num` steps, for Euler's method."""

        def velocity(t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
            return mean_velocity(self._network, torch.full_like(t, 1 / num), t, x, cond)

        return velocity


def record_flow(run: Path, flow: str) -> None:
    """Write from which flow a run's shortcuts learn."""
    replace_text(run / SHORTCUT / _FLOW, flow + "\n")


def require_same_flow(run: Path, flow: str) -> None:
    """UserError where a run's shortcuts were learned from a flow with another digest than its flow has now."""
    file = run / SHORTCUT / _FLOW
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace").strip() != flow:
        raise UserError(
            f"{run}: its shortcuts were learned from another state of its flow. Remove {run / SHORTCUT} and train them "
            f"again: cellflux-bridge train {run}; or set shortcut.steps=0"
        )


class ShortcutBatch(NamedTuple):
    """What is drawn for a batch of pairs, and lengths of steps (B,), of which times are multiples; 0 for none."""

    drawn: FlowDraw
    step: torch.Tensor


class ShortcutTask(FlowTask):
    """Self-consistency of a run's shortcuts, on the pairs of its flow's training."""

    def __init__(self, config: Config, patches: Patches, *, levels: np.ndarray | None = None):
        condition = config.condition.model_copy(update={"dropout": 0.0})
        config = config.model_copy(update={"train": config.shortcut.train, "condition": condition})
        try:
            super().__init__(config, patches, levels=levels)
        except UserError as error:
            raise UserError(re.sub(r"\btrain\.", "shortcut.train.", str(error))) from error
        self._flow = self.model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "shortcut", "weights"))
            self.model = build_shortcut(config)

    def begin(self) -> str:
        """Take up the weights of the run's trained flow, whose digest this gives; UserError where shortcuts that are
        there already were learned from another."""
        checkpoint.load_weights(checkpoint.latest(self._config.output), self._flow)
        self.model.load_state_dict(self.model.state_dict() | self._flow.state_dict())  # what embeds the length stays
        flow = checkpoint.weights_digest(self._flow)[:16]
        require_same_flow(self._config.output, flow)
        return flow

    def _with_steps(self, drawn: FlowDraw, share: float, *purpose: str | int) -> ShortcutBatch:
        generator, num = torch_generator(self._config.seed, "shortcut", *purpose), len(drawn.t)
        order, lengths = torch.randperm(num, generator=generator), self._config.shortcut.steps.bit_length()
        first = torch.randint(lengths, (), generator=generator)  # so that small batches have all lengths in turn
        is_step, count = order < share * num, 2.0 ** ((order + first) % lengths)  # 1, 1/2, ..., as many of each
        t = (torch.rand(num, generator=generator) * count).floor() / count
        drawn = drawn._replace(t=torch.where(is_step, t, drawn.t))
        return ShortcutBatch(drawn, torch.where(is_step, 1 / count, 0))

    def batch(self, index: int, *, rank: int) -> ShortcutBatch:
        return self._with_steps(super().batch(index, rank=rank), _SHARE, "train", index, rank)

    @torch.no_grad()
    def _target(self, model: nn.Module, t: torch.Tensor, x: torch.Tensor, cond: Condition, step: torch.Tensor):
        """What the mean velocity (B, C, H, W) of steps is to be: that of their two halves."""
        half, is_shortest = step / 2, step * self._config.shortcut.steps < 1.5
        target = torch.empty_like(x)
        for rows, velocity in ((is_shortest, self._midpoint), (~is_shortest, partial(mean_velocity, model))):
            if rows.any():
                h, at, begin, of = half[rows], t[rows], x[rows], cond.index(rows)
                first = velocity(h, at, begin, of).float()
                second = velocity(h, at + h, along(begin, h, first), of).float()
                target[rows] = (first + second) / 2
        return target

    def _midpoint(self, step: torch.Tensor, t: torch.Tensor, x: torch.Tensor, cond: Condition) -> torch.Tensor:
        flow, half = self._flow.to(x.device), step / 2
        return flow(t + half, along(x, half, flow(t, x, cond)), cond)

    def _found(self, model: nn.Module, batch: ShortcutBatch) -> tuple[FlowBatch, torch.Tensor, torch.Tensor]:
        """The states with the velocities that are wanted there, those found (B, C, H, W), and errors' weights (B,)."""
        states = self.states(batch.drawn)
        t, x, target, cond = states
        rows = batch.step > 0
        target[rows] = self._target(model, t[rows], x[rows], cond.index(rows), batch.step[rows])
        return states, mean_velocity(model, batch.step, t, x, cond).float(), self.model.error_weight(t)

    def loss(self, model: nn.Module, batch: ShortcutBatch) -> torch.Tensor:
        states, found, weight = self._found(model, batch)
        plain = batch.step == 0  # the others lead to no end
        t, x, wanted = (of[plain] for of in states[:3])
        kept = FlowBatch(t, x, wanted, states.cond.index(plain))
        perceptual = self.perceptual_loss(found[plain], kept)
        return velocity_error(found, states.u_t, weight) + plain.float().mean() * perceptual

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """On held-out pairs: the squared error of steps against their two halves, relative to the power of these."""
        found = []
        for number in range(self._num_val_batches):
            batch = self._with_steps(self._draw(self._val.batch(number), "val", number), 1.0, "val", number)
            states, v, weight = self._found(model, move_data_to_device(batch, device))
            zero, num = torch.zeros_like(v), len(v)
            found.append([num * velocity_error(of, states.u_t, weight).item() for of in (v, zero)])
        error, power = np.sum(found, axis=0)
        return {"val/shortcut_error": error / max(power, 1e-12)}

    def sheet(self, model: nn.Module, device: torch.device) -> None:
        return None

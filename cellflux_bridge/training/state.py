"""The state of a training: everything that a resumed run needs to repeat an uninterrupted one."""

import time
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import Config
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.training.processes import on_rank_zero
from cellflux_bridge.training.settings import TrainConfig


class Spent(NamedTuple):
    """Seconds of training: of the clock, and of this process's threads together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @staticmethod
    def now() -> "Spent":
        return Spent(time.monotonic(), time.process_time())

    def since(self, began: "Spent") -> "Spent":
        seconds, cpu_seconds = Spent.now()
        return Spent(self.seconds + seconds - began.seconds, self.cpu_seconds + cpu_seconds - began.cpu_seconds)

    def share(self, train: TrainConfig) -> float:
        """How much of the minutes that a training may take is spent; 0 where they are not limited."""
        limits = ((self.seconds, train.max_minutes), (self.cpu_seconds, train.max_cpu_minutes))
        return max((spent / (60 * limit) for spent, limit in limits if limit is not None), default=0.0)


class EMA:
    """A copy `module` of a model, which update n >= 1 moves towards it by 1 - min(decay, (1 + n) / (10 + n)).

    The warm-up keeps the random initial weights from lingering in short runs; update 0 takes the model's. Buffers are
    averaged alike, so that the statistics of a batch normalisation are not those of the last few batches; counters are
    copied. Unlike torch's `AveragedModel` it counts updates in Python: a counter that is read back from a GPU makes
    every update wait for it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.num_updates, self._decay = deepcopy(model), 0, decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = self.num_updates
        pairs = list(zip(*(chain(m.parameters(), m.buffers()) for m in (self.module, model)), strict=True))
        moved = [pair for pair in pairs if n and pair[0].is_floating_point()]
        if moved:
            share = 1 - min(self._decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(*map(list, zip(*moved, strict=True)), share)
        for own, other in pairs:
            if not (n and own.is_floating_point()):
                own.copy_(other)
        self.num_updates += 1


@dataclass
class TrainState:
    """Raw weights, their average, the optimiser, the number of updates and the time spent."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    ema: EMA
    step: int = 0
    spent: Spent = field(default_factory=Spent)

    def load(self, run: Path) -> None:
        """Take up the newest checkpoint of a run folder, in every process; without one nothing changes.

        To be called after Fabric's set-up: an optimiser's state is laid where its parameters are. Raises UserError
        for a file that is truncated, too large, or of another network.
        """
        if not checkpoint.exists(run):
            return
        newest = checkpoint.latest(run)
        state = checkpoint.load_state(newest, most=self._most_bytes())
        try:
            self.model.load_state_dict(state["model"], strict=True)
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = self.ema.num_updates = state["step"]
            self.spent = Spent(state["seconds"], state["cpu_seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{newest / checkpoint.STATE}: not the state of this training ({error})") from error
        checkpoint.load_weights(newest, self.ema.module)

    def save(self, run: Path, fabric: Fabric, *, config: Config, preprocessing: Preprocessing, keep: int) -> None:
        """Write a checkpoint: see `checkpoint.save`. All processes call it, the first one writes."""
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        state |= {"step": self.step, **self.spent._asdict()}
        write = partial(checkpoint.save, run, step=self.step, weights=self.ema.module.state_dict(), state=state)
        on_rank_zero(fabric, lambda: write(config=config, preprocessing=preprocessing, keep=keep))

    def _most_bytes(self) -> int:
        """Twice what a state file of this network can hold: raw weights and two moments of each, and names."""
        tensors = self.model.state_dict().values()
        return 2 * (3 * sum(t.nbytes for t in tensors) + 10_000 * len(tensors) + 1_000_000)

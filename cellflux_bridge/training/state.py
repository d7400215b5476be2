"""The state of a training: everything that a resumed run needs to repeat an uninterrupted one."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import Config
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.training.ema import EMA
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
        if not any((run / "checkpoints").glob("step-*[0-9]")):
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

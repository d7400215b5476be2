"""One training loop on Lightning Fabric, for flows, classifiers and bridges alike."""

import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_utilities import apply_to_collection
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import prefetch
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.config import Config
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import write_png
from cellflux_bridge.training.optimiser import build_optimiser, learning_rate
from cellflux_bridge.training.processes import from_rank_zero, make_fabric, on_rank_zero, only_writer
from cellflux_bridge.training.run import Log
from cellflux_bridge.training.settings import TrainConfig
from cellflux_bridge.training.state import EMA, Spent, TrainState

__all__ = ["Stopped", "Task", "fit", "from_rank_zero", "make_fabric", "on_rank_zero"]


class Task(Protocol):
    """What is trained. `batch` runs in several threads at once and depends on its arguments alone; `loss` gets what it
    returned on the device, so a batch is small (uint8 patches), and what is large is made of it there."""

    model: nn.Module
    preprocessing: Preprocessing

    def batch(self, index: int, *, rank: int) -> Any: ...
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor: ...
    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]: ...
    def sheet(self, model: nn.Module, device: torch.device) -> np.ndarray | None: ...


class Stopped(Exception):
    """Training was stopped by a signal after saving; `code` is the exit status that a shell expects."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; everything is saved")
        self.code = 128 + signal_number


# Seconds in which signals are one: torchrun forwards the Ctrl-C that the terminal has already sent to all.
_ONE_KEYPRESS = 1.0
# Updates after which it is said how long a training will take here.
_TIMED = 10
# Updates whose batches are made beforehand, each by a thread of its own.
_NUM_AHEAD = 4


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying from them; another one, a second later, kills as usual."""
    caught: list[int] = []
    times: list[float] = []

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number, frame):
        caught.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > _ONE_KEYPRESS:
            restore()
            signal.raise_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()  # elsewhere Python may not
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        restore()


def fit(task: Task, config: Config, train: TrainConfig, *, folder: Path, fabric: Fabric) -> Path:
    """Train `task` to `train.steps` updates, from its newest checkpoint if there is one; returns the last checkpoint.

    Batches are functions of (seed, update, rank), so a resumed run repeats an uninterrupted one; on CPU bit for bit.
    Raises UserError for a non-finite loss (the last good checkpoint stays) and where another process trains in
    `folder`; Stopped after Ctrl-C or SIGTERM.
    """
    with only_writer(fabric, folder):
        return _fit(task, config, train, folder, fabric)


def _fit(task: Task, config: Config, train: TrainConfig, folder: Path, fabric: Fabric) -> Path:
    model = task.model.to(memory_format=torch.channels_last)
    if train.init_from is not None and not checkpoint.exists(folder):
        checkpoint.init_from(train.init_from.expanduser(), model, config)
        getattr(model, "prepare", lambda: None)()  # what is read and not learned is this run's own
    wrapped, optimiser = fabric.setup(model, build_optimiser(model, train))
    state = TrainState(model, optimiser, EMA(model, train.ema_decay))
    state.load(folder)
    if state.step >= train.steps or state.spent.share(train) >= 1:
        fabric.print(f"{folder}: trained already ({state.step} steps); raise its steps or minutes to go on")
        return checkpoint.latest(folder)
    with _caught_signals() as caught:
        return _Trainer(task, config, train, folder, fabric, wrapped, state).run(caught)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 6000 else f"about {seconds / 3600:.1f} hours"


class _Trainer:
    """One call of `fit`; `model` is the network as Fabric wraps it."""

    def __init__(self, task, config, train, folder, fabric, model, state):
        self.task, self.config, self.train, self.folder, self.fabric = task, config, train, folder, fabric
        self.model, self.state = model, state
        self.log = Log(folder, from_step=state.step, tensorboard=train.tensorboard) if fabric.is_global_zero else None
        self.logged, self.pace_began = state.step, time.monotonic()  # since when images are counted, reports left out
        self.signalled = 0
        self.is_finite = torch.ones((), dtype=torch.bool, device=fabric.device)

    def run(self, caught: list[int]) -> Path:
        train, state, fabric = self.train, self.state, self.fabric
        options = {"total": train.steps, "initial": state.step, "unit": "step", "smoothing": 0.05}
        bar = progress(desc=f"training {self.folder.name}", disable=not fabric.is_global_zero, **options)
        first, upcoming = state.step, prefetch(self._batches, range(state.step, train.steps), num=_NUM_AHEAD)
        with bar, closing(upcoming):
            while True:
                began = Spent.now()
                loss, norm = self._update(next(upcoming))
                state.step += 1
                bar.update()
                if state.step - first == _TIMED and fabric.is_global_zero:
                    bar.write(self._left((time.monotonic() - self.pace_began) / _TIMED, began))
                done = self._agreed_stop(caught, began) or state.step >= train.steps
                if done or state.step % train.log_every == 0:
                    self._require_finite()
                    bar.total = self._expected_steps(began)
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                    self._log_update(loss, norm)
                self._periodic(done)
                state.spent = state.spent.since(began)
                if done or state.step % train.checkpoint_every == 0:
                    self._require_finite()
                    keep, preprocessing = train.keep_checkpoints, self.task.preprocessing
                    state.save(self.folder, fabric, config=self.config, preprocessing=preprocessing, keep=keep)
                if done:
                    break
        if self.signalled:  # any of the processes: all leave together
            raise Stopped(self.signalled, state.step)
        return checkpoint.latest(self.folder)

    def _left(self, pace: float, began: Spent) -> str:
        """How long it will take, at `pace` seconds an update."""
        updates, share = self.train.steps - self.state.step, self.state.spent.since(began).share(self.train)
        by_clock = self.state.spent.since(began).seconds * (1 / share - 1) if share else float("inf")
        if by_clock < updates * pace:
            return f"{by_clock / pace:.0f} updates, perhaps, are left: {_duration(by_clock)}, by max_minutes"
        return f"{updates} updates are left: {_duration(updates * pace)} on this machine"

    def _expected_steps(self, began: Spent) -> int:
        """The step at which steps or minutes will have run out, at the pace so far; what the bar counts to."""
        step, most, share = self.state.step, self.train.steps, self.state.spent.since(began).share(self.train)
        return min(most, max(step, round(step / share))) if share else most

    def _batches(self, step: int) -> list[Any]:
        num, rank = self.train.accumulate, self.fabric.global_rank
        batches = [self.task.batch(index, rank=rank) for index in range(step * num, (step + 1) * num)]
        if self.fabric.device.type != "cuda":
            return batches
        return apply_to_collection(batches, torch.Tensor, torch.Tensor.pin_memory)  # so that copies do not wait

    def _update(self, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        train, step, optimiser = self.train, self.state.step, self.state.optimiser
        # Dropout inside networks draws from the global generator; seeded by step, it repeats after a resume.
        torch.manual_seed(derive_seed(self.config.seed, "network", step, self.fabric.global_rank))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, train)
        total = torch.zeros((), device=self.fabric.device)
        for number, batch in enumerate(batches, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(batches)):
                loss = self.task.loss(self.model, self.fabric.to_device(batch)) / len(batches)
                self.fabric.backward(loss)
            total += loss.detach()
        self.is_finite &= torch.isfinite(total)
        norm = torch.zeros(())
        if most := train.gradient_clip:
            norm = self.fabric.clip_gradients(self.model, optimiser, max_norm=most, error_if_nonfinite=False)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.state.ema.update(self.state.model)
        return total, norm

    def _agreed_stop(self, caught: list[int], began: Spent) -> bool:
        """Whether any process was signalled or has run out of time; all processes answer alike."""
        flags = [caught[0] if caught else 0, int(self.state.spent.since(began).share(self.train) >= 1)]
        if self.fabric.world_size > 1:  # a copy to a GPU, and back, would make every update wait
            shared = torch.tensor(flags, dtype=torch.float32, device=self.fabric.device)
            flags = list(map(int, self.fabric.all_reduce(shared, reduce_op="max").tolist()))
        self.signalled = flags[0]
        return any(flags)

    def _require_finite(self) -> None:
        # A finite loss can have an infinite gradient: the weights tell.
        weights = [torch.isfinite(p).all() for p in self.model.parameters()]
        finite = torch.stack([self.is_finite, *weights]).all().float()
        if self.fabric.all_reduce(finite, reduce_op="mean") < 1:
            last = max((self.folder / "checkpoints").glob("step-*[0-9]"), default=None)
            raise UserError(
                f"train: the loss or the weights are not finite at or before step {self.state.step}; lower train.lr, "
                "raise train.warmup_steps or keep train.gradient_clip on. "
                + (f"The last good checkpoint is {last}" if last else "No checkpoint had been written")
            )

    def _log_update(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        if self.log is not None:
            state, now = self.state, time.monotonic()
            images = (state.step - self.logged) * self.train.batch_size * self.train.accumulate * self.fabric.world_size
            lr, rate = state.optimiser.param_groups[0]["lr"], images / max(now - self.pace_began, 1e-9)
            values = {"loss": loss.item(), "gradient_norm": norm.item(), "lr": lr, "images_per_second": rate}
            self.log.write(state.step, {**values, **state.spent._asdict()})
            self.logged, self.pace_began = state.step, now

    def _periodic(self, done: bool) -> None:
        train, step, model = self.train, self.state.step, self.state.ema.module
        is_validated = done or step % train.validate_every == 0
        is_sampled = train.sample_every and (done or step % train.sample_every == 0)

        def report() -> None:
            with warnings.catch_warnings(), torch.no_grad(), self.fabric.autocast():
                warnings.simplefilter("ignore", UserWarning)
                model.eval()
                if is_validated:
                    self.log.write(step, self.task.validate(model, self.fabric.device))
                sheet = self.task.sheet(model, self.fabric.device) if is_sampled else None
                if sheet is not None:
                    (self.folder / "samples").mkdir(exist_ok=True)
                    write_png(self.folder / "samples" / f"step-{step:08d}.png", sheet)

        if is_validated or is_sampled:
            began = time.monotonic()
            on_rank_zero(self.fabric, report)
            self.pace_began += time.monotonic() - began

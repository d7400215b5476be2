"""One training loop on Lightning Fabric, for flows, classifiers and bridges alike."""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.parallel import prefetch
from cellflux_bridge.base.progress import progress
from cellflux_bridge.base.seeds import derive_seed
from cellflux_bridge.config import Config
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.images import write_png
from cellflux_bridge.training.ema import EMA
from cellflux_bridge.training.run import Log
from cellflux_bridge.training.settings import TrainConfig

_T = TypeVar("_T")


class Task(Protocol):
    """What is trained. `batch` runs in several threads at once and depends on its arguments alone."""

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
# How long processes wait for one that works alone: a cache, cross-fitted levels, a validation. Fabric: half an hour.
_PATIENCE = timedelta(days=1)
# Updates whose batches are made beforehand, each by a thread of its own.
_NUM_AHEAD = 4


def make_fabric(config: TrainConfig, *, section: str = "train") -> Fabric:
    """Fabric for a training, whose section an error names; under torchrun the number of processes is torchrun's."""
    devices, num_nodes, strategy = config.devices, config.num_nodes, config.strategy
    if "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
        strategy = "ddp" if strategy == "auto" and int(os.environ["WORLD_SIZE"]) > 1 else strategy
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=config.precision,
        )
    except Exception as error:  # Fabric raises many kinds for values that only it knows
        raise UserError(
            f"{section}.accelerator={config.accelerator}, devices={devices}, strategy={strategy}, "
            f"precision={config.precision}: not possible here ({error})"
        ) from error
    # Fabric would round the inputs as well; a time in bfloat16 has three digits. Autocast is for inside the network.
    fabric.strategy.precision.convert_input = lambda data: data
    if isinstance(fabric.strategy, DDPStrategy):  # `auto` with several devices, too; read when processes are launched
        fabric.strategy._timeout = _PATIENCE
    return fabric


def on_rank_zero(fabric: Fabric, work: Callable[[], None]) -> None:
    """Let one process do `work` while the others wait; where it fails all raise, so that none waits for ever: a
    UserError alike, anything else as it is in that process and as a RuntimeError in the others."""
    failure = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as error:
            failure = error
        except BaseException as error:
            fabric.broadcast(RuntimeError(f"the first process failed: {type(error).__name__}: {error}"))
            raise
    failure = fabric.broadcast(failure)
    if failure is not None:
        raise failure


def from_rank_zero(fabric: Fabric, work: Callable[[], _T]) -> _T:
    """What `work` returns in one process, for all of them; where it fails all raise, as in `on_rank_zero`."""
    found: list[_T] = []
    on_rank_zero(fabric, lambda: found.append(work()))
    return fabric.broadcast(found[0] if found else None)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying from them; another one, a second later, kills as usual."""
    caught: list[int] = []
    times: list[float] = []

    def note(number, frame):
        caught.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > _ONE_KEYPRESS:
            for other, handler in previous.items():
                signal.signal(other, handler)
            if callable(previous[number]):
                previous[number](number, frame)
            else:
                os.kill(os.getpid(), number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(task: Task, config: Config, train: TrainConfig, *, folder: Path, fabric: Fabric) -> Path:
    """Train `task` to `train.steps` updates, from its newest checkpoint where there is one; returns the last one.

    Batches are functions of (seed, update, rank), so a resumed run repeats an uninterrupted one; on CPU bit for bit.
    Raises UserError for a non-finite loss (the last good checkpoint stays) and Stopped after Ctrl-C or SIGTERM.
    """
    model = task.model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    wrapped, optimiser = fabric.setup(model, optimiser)
    ema = EMA(model, train.ema_decay)
    # After the set-up, because an optimiser's state is laid where its parameters are when it is loaded.
    step, spent = _restore(folder, model, optimiser, ema)
    if step >= train.steps or spent.exceeds(train):
        fabric.print(f"{folder}: trained already ({step} steps); raise its steps or minutes to go on")
        return checkpoint.latest(folder)
    trainer = _Trainer(task, config, train, folder, fabric, wrapped, optimiser, ema, step, spent)
    with _caught_signals() as caught:
        return trainer.run(caught)


class _Spent(NamedTuple):
    """Seconds of training: of the clock, and of this process's threads together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @staticmethod
    def now() -> "_Spent":
        return _Spent(time.monotonic(), time.process_time())

    def since(self, began: "_Spent") -> "_Spent":
        seconds, cpu_seconds = _Spent.now()
        return _Spent(self.seconds + seconds - began.seconds, self.cpu_seconds + cpu_seconds - began.cpu_seconds)

    def share(self, train: TrainConfig) -> float:
        """How much of the minutes that a training may take is spent; 0 where they are not limited."""
        limits = ((self.seconds, train.max_minutes), (self.cpu_seconds, train.max_cpu_minutes))
        return max((spent / (60 * limit) for spent, limit in limits if limit is not None), default=0.0)

    def exceeds(self, train: TrainConfig) -> bool:
        return self.share(train) >= 1


def _restore(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, ema: EMA) -> tuple[int, _Spent]:
    if not any((folder / "checkpoints").glob("step-*[0-9]")):
        return 0, _Spent()
    newest = checkpoint.latest(folder)
    state = checkpoint.load_state(newest)
    model.load_state_dict(state["model"], strict=True)
    optimiser.load_state_dict(state["optimiser"])
    checkpoint.load_weights(newest, ema.module)
    ema.num_updates = state["step"]
    return state["step"], _Spent(state["seconds"], state.get("cpu_seconds", 0.0))


class _Trainer:
    """The state of one call of `fit`."""

    def __init__(self, task, config, train, folder, fabric, model, optimiser, ema, step, spent):
        self.task, self.config, self.train, self.folder, self.fabric = task, config, train, folder, fabric
        self.model, self.optimiser, self.ema, self.step, self.spent = model, optimiser, ema, step, spent
        self.log = Log(folder, from_step=step, tensorboard=train.tensorboard) if fabric.is_global_zero else None
        self.signalled = 0
        self.is_finite = torch.ones((), dtype=torch.bool, device=fabric.device)

    def run(self, caught: list[int]) -> Path:
        train, fabric = self.train, self.fabric
        bar = progress(
            total=train.steps,
            initial=self.step,
            desc=f"training {self.folder.name}",
            unit="step",
            smoothing=0.05,
            disable=not fabric.is_global_zero,
        )
        upcoming = prefetch(self._batches, range(self.step, train.steps), num=_NUM_AHEAD)
        with bar, closing(upcoming):
            while True:
                began = _Spent.now()
                batches = next(upcoming)
                loss, norm = self._update(batches)
                self.step += 1
                bar.update()
                stop = self._agreed_stop(caught, began)
                done = self.step >= train.steps or stop
                if done or self.step % train.log_every == 0:
                    self._require_finite()
                    bar.total = self._expected_steps(began)
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                    self._log_update(loss, norm, began)
                self._periodic(done)
                self.spent = self.spent.since(began)
                if done or self.step % train.checkpoint_every == 0:
                    self._require_finite()
                    self._save()
                if done:
                    break
        if self.signalled:  # any of the processes: all leave together
            raise Stopped(self.signalled, self.step)
        return checkpoint.latest(self.folder)

    def _expected_steps(self, began: _Spent) -> int:
        """The step at which steps or minutes will have run out, at the pace so far; what the bar counts to."""
        share = self.spent.since(began).share(self.train)
        return min(self.train.steps, max(self.step, round(self.step / share))) if share else self.train.steps

    def _batches(self, step: int) -> list[Any]:
        first = step * self.train.accumulate
        rank = self.fabric.global_rank
        return [self.task.batch(first + micro, rank=rank) for micro in range(self.train.accumulate)]

    def _update(self, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        train = self.train
        # Dropout inside networks draws from the global generator; seeded by step, it repeats after a resume.
        torch.manual_seed(derive_seed(self.config.seed, "network", self.step, self.fabric.global_rank))
        for group in self.optimiser.param_groups:
            group["lr"] = train.lr * min(1.0, (self.step + 1) / max(1, train.warmup_steps))
        total = torch.zeros((), device=self.fabric.device)
        for number, batch in enumerate(batches, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(batches)):
                loss = self.task.loss(self.model, self.fabric.to_device(batch)) / len(batches)
                self.fabric.backward(loss)
            total += loss.detach()
        self.is_finite &= torch.isfinite(total)
        norm = torch.zeros(())
        if train.gradient_clip:
            norm = self.fabric.clip_gradients(
                self.model, self.optimiser, max_norm=train.gradient_clip, error_if_nonfinite=False
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.model.module)
        return total, norm

    def _agreed_stop(self, caught: list[int], began: _Spent) -> bool:
        """Whether any process was signalled or has run out of time; all processes answer alike."""
        signalled, late = caught[0] if caught else 0, self.spent.since(began).exceeds(self.train)
        if self.fabric.world_size > 1:
            flags = torch.tensor([float(signalled), float(late)], device=self.fabric.device)
            signalled, late = map(int, self.fabric.all_reduce(flags, reduce_op="max").tolist())
        self.signalled = signalled
        return bool(signalled or late)

    def _require_finite(self) -> None:
        # A finite loss can have an infinite gradient: the weights tell.
        weights = [torch.isfinite(p).all() for p in self.model.parameters()]
        finite = torch.stack([self.is_finite, *weights]).all().float()
        if self.fabric.world_size > 1:
            finite = self.fabric.all_reduce(finite, reduce_op="mean")
        if finite < 1:
            found = sorted((self.folder / "checkpoints").glob("step-*[0-9]"))
            raise UserError(
                f"train: the loss or the weights are not finite at or before step {self.step}; lower train.lr, raise "
                "train.warmup_steps or keep train.gradient_clip on. "
                + (f"The last good checkpoint is {found[-1]}" if found else "No checkpoint had been written")
            )

    def _log_update(self, loss: torch.Tensor, norm: torch.Tensor, began: _Spent) -> None:
        if self.log is not None:
            images = self.train.batch_size * self.train.accumulate * self.fabric.world_size
            rate = images / max(time.monotonic() - began.seconds, 1e-9)
            lr = self.optimiser.param_groups[0]["lr"]
            values = {"loss": loss.item(), "gradient_norm": norm.item(), "lr": lr, "images_per_second": rate}
            self.log.write(self.step, {**values, **self.spent._asdict()})

    def _periodic(self, done: bool) -> None:
        train = self.train
        is_validated = done or self.step % train.validate_every == 0
        is_sampled = train.sample_every and (done or self.step % train.sample_every == 0)

        def report() -> None:
            with warnings.catch_warnings(), torch.no_grad(), self.fabric.autocast():
                warnings.simplefilter("ignore", UserWarning)
                self.ema.module.eval()
                if is_validated:
                    self.log.write(self.step, self.task.validate(self.ema.module, self.fabric.device))
                sheet = self.task.sheet(self.ema.module, self.fabric.device) if is_sampled else None
                if sheet is not None:
                    (self.folder / "samples").mkdir(exist_ok=True)
                    write_png(self.folder / "samples" / f"step-{self.step:08d}.png", sheet)

        if is_validated or is_sampled:
            on_rank_zero(self.fabric, report)

    def _save(self) -> None:
        state = {
            "step": self.step,
            **self.spent._asdict(),
            "model": self.model.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        save = partial(
            checkpoint.save,
            self.folder,
            step=self.step,
            weights=self.ema.module.state_dict(),
            state=state,
            config=self.config,
            preprocessing=self.task.preprocessing,
            keep=self.train.keep_checkpoints,
        )
        on_rank_zero(self.fabric, save)

"""The processes and devices of a training, by Lightning Fabric."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.locks import writing
from cellflux_bridge.training.settings import TrainConfig

_T = TypeVar("_T")
# How long processes wait for one that works alone: a cache, cross-fitted levels, a validation. Fabric: half an hour.
_PATIENCE = timedelta(days=1)


def make_fabric(config: TrainConfig, *, section: str = "train") -> Fabric:
    """Fabric for a training; `section` names its settings in errors. Under torchrun the number of processes is
    torchrun's."""
    options = config.model_dump(include={"accelerator", "devices", "num_nodes", "strategy", "precision"})
    if "LOCAL_WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        options |= {"devices": local, "num_nodes": world // local}
        if world > 1:
            options["strategy"] = "ddp"
    try:
        fabric = Fabric(**options)
    except Exception as error:  # Fabric raises many kinds for values that only it knows
        values = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"{section}.{values}: not possible here ({error})") from error
    # Fabric would round the inputs as well; a time in bfloat16 has three digits. Autocast is for inside the network.
    fabric.strategy.precision.convert_input = lambda data: data
    if isinstance(fabric.strategy, DDPStrategy):  # `auto` with several devices, too; read when processes are launched
        fabric.strategy._timeout = _PATIENCE
    return fabric


def on_rank_zero(fabric: Fabric, work: Callable[[], object]) -> None:
    """Let the first process do `work` while the others wait; failures as in `from_rank_zero`."""

    def alone() -> None:
        work()

    from_rank_zero(fabric, alone)


@contextmanager
def only_writer(fabric: Fabric, folder: Path) -> Iterator[None]:
    """A block in which the processes of `fabric`, and no others, write to `folder`: see `locks.writing`."""
    with ExitStack() as held:
        on_rank_zero(fabric, lambda: held.enter_context(writing(folder)))
        yield


def from_rank_zero(fabric: Fabric, work: Callable[[], _T]) -> _T:
    """What `work` returns in the first process, for all of them. If it fails, all raise and none waits for ever: a
    UserError in all, any other error as it is in the first process and as a RuntimeError in the others."""
    found = failure = None
    if fabric.is_global_zero:
        try:
            found = work()
        except UserError as error:
            failure = error
        except BaseException as error:
            fabric.broadcast((None, RuntimeError(f"the first process failed: {type(error).__name__}: {error}")))
            raise
    found, failure = fabric.broadcast((found, failure))
    if failure is not None:
        raise failure
    return found

"""The processes and devices of a training, by Lightning Fabric."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.training.settings import TrainConfig

_T = TypeVar("_T")
# How long processes wait for one that works alone: a cache, cross-fitted levels, a validation. Fabric: half an hour.
_PATIENCE = timedelta(days=1)


def make_fabric(config: TrainConfig, *, section: str = "train") -> Fabric:
    """Fabric for a training; `section` names its settings in errors. Under torchrun the number of processes is
    torchrun's."""
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
    """Let the first process do `work` while the others wait. If it fails, all raise and none waits for ever: a
    UserError in all, any other error as it is in the first process and as a RuntimeError in the others."""
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
    """What `work` returns in the first process, for all of them; if it fails all raise, as in `on_rank_zero`."""
    found: list[_T] = []
    on_rank_zero(fabric, lambda: found.append(work()))
    return fabric.broadcast(found[0] if found else None)

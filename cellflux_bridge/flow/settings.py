"""Shortcuts of a flow: how long their steps are, and how they are trained."""

from typing import Annotated, Literal

from pydantic import Field

from cellflux_bridge.config.schema import Count, Section
from cellflux_bridge.training.settings import CompanionTrainConfig


class ShortcutTrainConfig(CompanionTrainConfig):
    """The training of shortcuts: it begins with the flow's weights."""

    steps: Count = 600
    lr: Annotated[float, Field(gt=0, le=100)] = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 30


class ShortcutConfig(Section):
    """`steps`: the most steps from start to end that shortcuts are trained for, a power of two, with all smaller ones;
    0: no shortcuts."""

    steps: Literal[0, 1, 2, 4, 8, 16] = 0
    train: ShortcutTrainConfig = ShortcutTrainConfig()

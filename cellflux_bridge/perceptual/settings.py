"""How much of a training is a perceptual loss."""

from typing import Annotated

from pydantic import Field

from cellflux_bridge.config.schema import Section


class PerceptualConfig(Section):
    """`share`: how long the gradient of the perceptual loss is at predicted images, relative to that of the squared
    error; 0: no such loss. A flow has it at times t above `after`."""

    share: Annotated[float, Field(ge=0, le=10)] = 0.0
    after: Annotated[float, Field(ge=0, lt=1)] = 0.2

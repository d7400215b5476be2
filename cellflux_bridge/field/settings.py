"""Classifier-gradient guidance of a flow."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cellflux_bridge.config.schema import NonNegative, Section


class GuidanceConfig(Section):
    """Classifier-gradient guidance of a flow: `field.classifier_guided` explains the forms."""

    form: Literal["none", "endpoint", "score", "bridge", "sharpen"] = "none"
    weight: NonNegative = 1.0
    start: Annotated[float, Field(gt=0, lt=1)] = 0.05  # endpoint is off before it; the other forms bound b(t) there
    # run folders of guides, whose opinions are pooled; empty: all guides of the flow's own run
    guides: list[Path] = Field(default=[])

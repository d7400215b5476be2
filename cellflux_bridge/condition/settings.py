"""What a velocity network is told."""

from typing import Literal

from cellflux_bridge.config.schema import Count, Fraction, Section


class ConditionConfig(Section):
    """What the velocity network is told beside the time and the state."""

    target: Literal["class", "level"] = "class"
    # What the level of a training image is, where target is "level": its score in the data, the probabilities that
    # classifiers give it which were not trained on its group (cross-fitting), or its class alone.
    level: Literal["score", "crossfit", "class"] = "class"
    level_bins: Count = 4
    source_class: bool = True
    source_image: bool = False
    dropout: Fraction = 0.1

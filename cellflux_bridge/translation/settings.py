"""What is translated, and how."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cellflux_bridge.config.schema import Count, Fraction, NonNegative, Section
from cellflux_bridge.field.settings import GuidanceConfig

Levels = Annotated[list[Fraction], Field(min_length=1)]


class TranslateConfig(Section):
    source: str | None = None
    target: str | None = None
    split: Literal["train", "val", "test"] = "test"
    num: Count | None = 64
    method: Literal["path", "progression", "depth"] = "path"
    solver: Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5"] = "midpoint"
    steps: Count = 25
    frames: Annotated[int, Field(ge=2)] = 11  # of the path method
    levels: Count | Levels = 10  # of the stairs: how many after the source, or which
    spacing: Literal["uniform", "adaptive"] = "uniform"
    # progression: what the network is told for a level: the level itself, or the condition at which, on validation
    # patches, the guide's mean probability of the target is the level, or that share of the way in its features is made
    calibrate: Literal["none", "probability", "distance"] = "none"
    # on each source by itself, by a coarse stair of its own, instead of on validation patches
    calibrate_each: bool = False
    # progression: null starts every level from the same random noise; a number from that which gives back the source,
    # and which level 1 has exchanged for random noise in this share (0: not at all, 1: wholly)
    noise_resampling: Fraction | None = None
    depths: Literal["rising", "full"] | Levels = "rising"  # depth stairs: how far back each level starts
    conditions: Literal["target", "rising"] | Levels = "target"  # depth stairs: the level that each is told
    guidance_scale: NonNegative = 1.0
    guidance: GuidanceConfig = GuidanceConfig()
    reverse: bool = False
    batch_size: Count = 64  # images that go through the network at once

    @property
    def needs_pilot(self) -> bool:
        """Whether levels, or what the network is told for them, are measured before anything is translated."""
        measured = self.calibrate != "none" and not self.calibrates_each
        return self.method == "progression" and (measured or self.spacing == "adaptive")

    @property
    def calibrates_each(self) -> bool:
        """Whether what the network is told is measured on each source by itself."""
        return self.method == "progression" and self.calibrate != "none" and self.calibrate_each

    @field_validator("levels")
    @classmethod
    def _end_at_the_target(cls, levels):
        if isinstance(levels, list) and levels[-1] != 1:
            raise ValueError(f"the last level must be 1, the target, found {levels[-1]}")
        return levels

    @field_validator("levels", "depths", "conditions")
    @classmethod
    def _rising(cls, values, info):
        if isinstance(values, list):
            may_repeat = info.field_name != "levels"  # one dial may stand still while the other one turns
            if values != sorted(values if may_repeat else set(values)) or values[0] == 0:
                how = "never fall" if may_repeat else "rise strictly"
                raise ValueError(f"these must {how}, from above 0 to at most 1 (0 is the source itself)")
        return values

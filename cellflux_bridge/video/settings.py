"""What a video shows."""

from typing import Annotated, Literal

from pydantic import Field

from cellflux_bridge.config.schema import Few, Section


class VideoConfig(Section):
    formats: list[Literal["mp4", "webp", "gif", "strip"]] = Field(default=["mp4", "webp", "strip"])
    sequences: Few = 12
    columns: Few | None = None  # sequences in a row; null: as many as bring the grid near 16:9
    fps: Annotated[float, Field(gt=0, le=60)] = 10.0
    hold: Annotated[float, Field(ge=0, le=600)] = 0.8  # seconds that the first and the last frame stay
    ping_pong: bool = True
    tile: Few = 128  # px of a shown frame's longer side; larger frames shrink to it
    caption: bool = True
    show_source: bool = True

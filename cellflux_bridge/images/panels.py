"""Pictures of a Trajectory: a grid of sequences at one of its frames, and a still strip of levels.

Frames are shown as they are. Small ones are enlarged bicubically, since nearest neighbour's square edges flicker and
hide the tissue's texture.
"""

from bisect import bisect_right
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import resize, sheet, to_rgb
from cellflux_bridge.trajectory import Trajectory

STRIP_COLUMNS = 11
# WebP holds no more; H.264 and GIF hold at least as much.
MAX_SIDE = 16382
# A caption needs some room, even above a single small tile.
CAPTION_WIDTH = 220
PAPER, INK, GREY, TRACK, ACCENT = "#ffffff", "#202024", "#707076", "#e8e8eb", "#624a8c"


class Grid:
    """Sequences side by side on white, drawn at one frame at a time, under a caption bar.

    `shape` is the picture's (H, W), both even; `places` the (top, left) of each sequence's moving tile of
    `height` x `width` pixels; with `show_source` the still source stands `step` pixels left of it.
    """

    def __init__(self, trajectory: Trajectory, *, sequences, columns, tile, caption, show_source):
        count = min(sequences, len(trajectory.source_ids))
        self.trajectory, self.caption = trajectory, caption
        self.height, self.width = _tile_size(trajectory, tile)
        self.gap = max(4, tile // 12)
        self.step = self.width + max(2, tile // 48) if show_source else 0
        cell = np.array((self.height + self.gap, self.step + self.width + self.gap))
        columns = min(columns or _best_columns(count, cell), count)
        rows = -(-count // columns)
        width = max(columns * cell[1] + self.gap, CAPTION_WIDTH if caption else 0)
        self.font = ImageFont.load_default(size=min(20, max(12, width // 42)))
        top = self.gap + (round(self.font.size * 2.1) if caption else 0)
        left = (width - columns * cell[1] + self.gap) // 2 + self.step
        self.places = [tuple((top, left) + np.array(divmod(i, columns)) * cell) for i in range(count)]
        # yuv420p halves both sides.
        self.shape = tuple(int(side + side % 2) for side in (top + rows * cell[0], width))
        image = _paper(self.shape)
        if caption:
            right = self.shape[1] - self.gap - self.font.getlength("level 0.00") - self.font.size
            _draw_names(image, trajectory, self.gap, right, self.font)
        self._still = np.array(image)
        if show_source:
            self._paste(self._still, 0, self.step)

    def _paste(self, canvas: np.ndarray, k: int, shift: int = 0) -> None:
        for b, (top, left) in enumerate(self.places):
            shown = _shown(self.trajectory, k, b, self.height, self.width)
            canvas[top : top + self.height, left - shift : left - shift + self.width] = shown

    def draw(self, k: int) -> np.ndarray:
        """The grid at frame k, RGB uint8 (H, W, 3)."""
        canvas = self._still.copy()
        self._paste(canvas, k)
        if not self.caption:
            return canvas
        image = Image.fromarray(canvas)
        draw, level, size = ImageDraw.Draw(image), self.trajectory.levels[k], self.font.size
        left, right = self.gap, self.shape[1] - self.gap
        draw.text((right, self.gap + size), f"level {level:.2f}", GREY, self.font, anchor="rs")
        top = self.gap + round(size * 1.5)
        bottom = top + max(2, size // 6) - 1
        draw.rectangle((left, top, right - 1, bottom), TRACK)
        if done := round((right - left) * level):
            draw.rectangle((left, top, left + done - 1, bottom), ACCENT)
        return np.asarray(image)


def _best_columns(count: int, cell: np.ndarray) -> int:
    """The number of columns that brings the grid near 16:9 and leaves few places empty."""

    def badness(columns):
        rows = -(-count // columns)
        return abs(np.log(columns * cell[1] * 9 / (rows * cell[0] * 16))) + 2 * (rows * columns / count - 1)

    return min(range(1, count + 1), key=badness)


def draw_strip(trajectory: Trajectory, *, sequences: int, tile: int, caption: bool) -> np.ndarray:
    """Sequences (rows) at up to 11 evenly chosen levels (columns), with both ends; RGB uint8 (H, W, 3)."""
    count, last = min(sequences, len(trajectory.source_ids)), len(trajectory.levels) - 1
    chosen = np.linspace(0, last, min(STRIP_COLUMNS, last + 1)).round().astype(int)
    height, width = _tile_size(trajectory, tile)
    gap, margin = max(2, tile // 32), max(4, tile // 12)
    font = ImageFont.load_default(size=min(18, max(8, width // 6)))
    top = margin + (round(font.size * 3.2) if caption else 0)
    lefts = margin + np.arange(len(chosen)) * (width + gap)
    right = max(lefts[-1] + width, CAPTION_WIDTH if caption else 0)
    image = _paper((int(top + count * (height + gap) - gap + margin), int(right + margin)))
    if caption:
        _draw_names(image, trajectory, margin, right, font, spread=True)
        every = -(-int(font.getlength("0.00 ")) // (width + gap))
        for k, left in list(zip(chosen, lefts, strict=True))[::every]:
            place = (left + width / 2, margin + round(font.size * 2.6))
            ImageDraw.Draw(image).text(place, f"{trajectory.levels[k]:.2f}", GREY, font, anchor="ms")
    canvas = np.array(image)
    tiles = sheet([[_shown(trajectory, k, b, height, width) for k in chosen] for b in range(count)], gap=gap)
    canvas[top:-margin, margin : margin + tiles.shape[1]] = tiles
    return canvas


def named_rows(rows: dict[str, list[np.ndarray]], *, scale: int) -> np.ndarray:
    """A contact sheet of equally sized RGB uint8 tiles, a row under its name; `scale` enlarges every pixel."""
    font, gap, parts = ImageFont.load_default(size=15), 4, []
    tiles = sheet(list(rows.values()), scale=scale)
    height = (tiles.shape[0] + 2 * scale) // len(rows)  # of a row with the gap below it
    for number, name in enumerate(rows):
        bar = _paper((round(font.size * 1.6), tiles.shape[1]))
        ImageDraw.Draw(bar).text((gap, font.size), _fit(name, font, tiles.shape[1] - gap), INK, font, anchor="ls")
        parts += [np.array(bar), tiles[number * height : (number + 1) * height]]
    return np.concatenate(parts)


def _tile_size(trajectory: Trajectory, tile: int) -> tuple[int, int]:
    height, width = trajectory.frames.shape[-2:]
    scale = tile / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shown(trajectory: Trajectory, k: int, b: int, height: int, width: int) -> np.ndarray:
    """Frame k of sequence b as an RGB tile, whatever its channels."""
    return resize(np.ascontiguousarray(to_rgb(trajectory.frames[k, b].transpose(1, 2, 0))), height, width)


def _paper(shape: tuple[int, int]) -> Image.Image:
    height, width = shape
    if max(shape) > MAX_SIDE:
        raise UserError(
            f"video: {width} x {height} pixels, more than {MAX_SIDE} a side; choose fewer sequences or a smaller tile"
        )
    return Image.new("RGB", (width, height), PAPER)


def _fit(text: str, font, width: float) -> str:
    """Text in one line, cut with an ellipsis where it is wider than `width` pixels; empty if nothing fits."""
    # The default font has no accented letters; a bare letter reads better than an empty box.
    text = "".join(c for c in normalize("NFKD", " ".join(text.split())) if not combining(c))
    if font.getlength(text) <= width:
        return text
    kept = bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "…")) - 1
    return text[:kept].rstrip(" _-") + "…" if kept > 0 else ""


def _draw_names(image, trajectory: Trajectory, left, right, font, *, spread: bool = False) -> None:
    """Source, an arrow and target, as far from the top as from the left; `spread` puts the target at the right end."""
    draw, arrow, space = ImageDraw.Draw(image), font.size * 1.4, font.size * 0.5
    room = right - left - arrow - 2 * space
    target = _fit(trajectory.header.target, font, room)
    source = _fit(trajectory.header.source, font, max(room / 2, room - font.getlength(target)))
    target = _fit(trajectory.header.target, font, room - font.getlength(source))
    start = left + font.getlength(source) + space
    end = right - font.getlength(target) - space if spread else start + arrow
    baseline = left + font.size
    draw.text((left, baseline), source, INK, font, anchor="ls")
    draw.text((end + space, baseline), target, INK, font, anchor="ls")
    # The default font has no arrow.
    y, head = round(baseline - font.size * 0.3), max(2, font.size // 5)
    draw.line((start, y, end, y), GREY)
    draw.line((end - head, y - head, end, y, end - head, y + head), GREY)

"""Videos of a Trajectory: a grid of sequences that move together (mp4, webp, gif) and a still strip (png).

Frames are shown as they are, never cross-faded: a blended frame would be an image that no model made. Small
frames are enlarged bicubically, since nearest neighbour's square edges flicker and hide the tissue's texture.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from unicodedata import combining, normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree

from cellflux_bridge.config import VideoConfig
from cellflux_bridge.errors import UserError
from cellflux_bridge.images import resize, write_png
from cellflux_bridge.trajectory import Trajectory

FILES = {f: f"interpolation.{f}" for f in ("mp4", "webp", "gif")} | {"strip": "strip.png"}
STRIP_COLUMNS = 11
# WebP holds no more; H.264 and GIF hold at least as much.
MAX_SIDE = 16382
# A caption needs some room, even above a single small tile.
CAPTION_WIDTH = 220
PAPER, INK, GREY, TRACK, ACCENT = "#ffffff", "#202024", "#707076", "#e8e8eb", "#624a8c"
# Of a GIF's 256 colours the last marks unchanged pixels.
GIF_UNCHANGED = 255

Playback = list[tuple[int, int]]


def write_all(trajectory: Trajectory, folder: Path, video_config: VideoConfig) -> list[Path]:
    """Write every format that the configuration names into `folder` and return the files, in its order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / FILES[name] for name in dict.fromkeys(video_config.formats)]
    settings = video_config.model_dump(exclude={"formats"})
    for path in paths:
        write_video(trajectory, path, **settings)
    return paths


def write_video(
    trajectory: Trajectory,
    path: Path,
    *,
    sequences: int = 12,
    columns: int | None = None,
    fps: float = 10.0,
    hold: float = 0.8,
    ping_pong: bool = True,
    tile: int = 128,
    caption: bool = True,
    show_source: bool = True,
) -> None:
    """Write the first `sequences` of a trajectory in the format of the suffix: .mp4, .webp, .gif or .png.

    `tile` is the longer side of a shown frame in pixels (larger frames shrink to it), `hold` the seconds that
    the first and last frame stay, `columns` the sequences in a row (by default the grid comes near 16:9). A
    .png is the still strip, which heeds only `sequences`, `tile` and `caption`. The file appears whole or not
    at all. Raises UserError for another suffix, a picture too large and a PyAV without H.264; OSError passes.
    """
    encoders = {".mp4": _encode_mp4, ".webp": _encode_webp, ".gif": _encode_gif}
    suffix = path.suffix.lower()
    if suffix == ".png":
        write_png(path, draw_strip(trajectory, sequences=sequences, tile=tile, caption=caption))
        return
    if suffix not in encoders:
        raise UserError(f"{path}: expected a suffix of {', '.join(encoders)} or .png (a still strip)")
    layout = {"columns": columns, "tile": tile, "caption": caption, "show_source": show_source}
    grid = Grid(trajectory, sequences=sequences, **layout)
    shown = playback(len(trajectory.levels), fps=fps, hold=hold, ping_pong=ping_pong)
    with _renamed(path) as temporary:
        encoders[suffix](temporary, grid, shown, fps)


def playback(num_frames: int, *, fps: float, hold: float, ping_pong: bool) -> Playback:
    """(frame, ticks of 1 / fps that it stays) in the order shown; a loop joins the end to the start.

    Forward and, with `ping_pong`, back: 0 1 2 3 2 1, where 0 and 3 stay `hold` seconds, at least a tick.
    """
    held, last = max(1, round(hold * fps)), num_frames - 1
    forward = [(k, held if k in (0, last) else 1) for k in range(num_frames)]
    return forward + (forward[-2:0:-1] if ping_pong else [])


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
        _check_size(self.shape)
        self._still = self._draw_still()

    def _paste(self, canvas: np.ndarray, k: int, shift: int = 0) -> None:
        for b, (top, left) in enumerate(self.places):
            shown = _shown(self.trajectory, k, b, self.height, self.width)
            canvas[top : top + self.height, left - shift : left - shift + self.width] = shown

    def _draw_still(self) -> np.ndarray:
        image = Image.new("RGB", self.shape[::-1], PAPER)
        if self.caption:
            right = self.shape[1] - self.gap - self.font.getlength("level 0.00") - self.font.size
            _draw_names(image, self.trajectory, self.gap, right, self.gap, self.font)
        canvas = np.array(image)
        if self.step:
            self._paste(canvas, 0, self.step)
        return canvas

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
        top, done = self.gap + round(size * 1.5), round((right - left) * level)
        bottom = top + max(2, size // 6) - 1
        draw.rectangle((left, top, right - 1, bottom), TRACK)
        if done:
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
    shape = int(top + count * (height + gap) - gap + margin), int(right + margin)
    _check_size(shape)
    image = Image.new("RGB", shape[::-1], PAPER)
    if caption:
        _draw_names(image, trajectory, margin, right, margin, font, spread=True)
        every = -(-int(font.getlength("0.00 ")) // (width + gap))
        for k, left in list(zip(chosen, lefts, strict=True))[::every]:
            place = (left + width / 2, margin + round(font.size * 2.6))
            ImageDraw.Draw(image).text(place, f"{trajectory.levels[k]:.2f}", GREY, font, anchor="ms")
    canvas = np.array(image)
    for b in range(count):
        y = top + b * (height + gap)
        for k, left in zip(chosen, lefts, strict=True):
            canvas[y : y + height, left : left + width] = _shown(trajectory, k, b, height, width)
    return canvas


def _tile_size(trajectory: Trajectory, tile: int) -> tuple[int, int]:
    height, width = trajectory.frames.shape[-2:]
    scale = tile / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shown(trajectory: Trajectory, k: int, b: int, height: int, width: int) -> np.ndarray:
    """One frame as an RGB tile: of fewer than three channels the first in grey, of more the first three."""
    frame = trajectory.frames[k, b].transpose(1, 2, 0)
    rgb = frame[..., :3] if frame.shape[2] >= 3 else frame[..., :1].repeat(3, 2)
    return resize(np.ascontiguousarray(rgb), height, width)


def _check_size(shape: tuple[int, int]) -> None:
    if max(shape) > MAX_SIDE:
        raise UserError(
            f"video: {shape[1]} x {shape[0]} pixels, more than {MAX_SIDE} a side; "
            "choose fewer sequences or a smaller tile"
        )


def _fit(text: str, font, width: float) -> str:
    """Text in one line, cut with an ellipsis where it is wider than `width` pixels; empty if nothing fits."""
    # The default font has no accented letters; a bare letter reads better than an empty box.
    text = "".join(c for c in normalize("NFKD", " ".join(text.split())) if not combining(c))
    if font.getlength(text) <= width:
        return text
    kept = bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "…")) - 1
    return text[:kept].rstrip(" _-") + "…" if kept > 0 else ""


def _draw_names(image, trajectory: Trajectory, left, right, top, font, *, spread: bool = False) -> None:
    """Source, an arrow and target between left and right; `spread` puts the target at the right end."""
    draw, arrow, space = ImageDraw.Draw(image), font.size * 1.4, font.size * 0.5
    room = right - left - arrow - 2 * space
    target = _fit(trajectory.header.target, font, room)
    source = _fit(trajectory.header.source, font, max(room / 2, room - font.getlength(target)))
    target = _fit(trajectory.header.target, font, room - font.getlength(source))
    start = left + font.getlength(source) + space
    end = right - font.getlength(target) - space if spread else start + arrow
    baseline = top + font.size
    draw.text((left, baseline), source, INK, font, anchor="ls")
    draw.text((end + space, baseline), target, INK, font, anchor="ls")
    # The default font has no arrow.
    y, head = round(baseline - font.size * 0.3), max(2, font.size // 5)
    draw.line((start, y, end, y), GREY)
    draw.line((end - head, y - head, end, y, end - head, y + head), GREY)


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its real name when the body is through, or is removed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # PyAV's own errors do not name the file.
        temporary.touch()
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode_mp4(path: Path, grid: Grid, shown: Playback, fps: float) -> None:
    """H.264 in yuv420p, a frame in memory at a time; BT.709, and tagged so, lest players shift the stain."""
    import av

    try:
        av.Codec("libx264", "w")
    except ValueError as error:
        raise UserError(
            f"mp4: this PyAV ({av.__version__}) has no H.264 encoder (libx264); install PyAV from PyPI "
            "(pip install --force-reinstall av) or choose webp or gif"
        ) from error
    rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1000))
    bt709, limited = 1, 1
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17", "preset": "slow"})
        (stream.height, stream.width), stream.pix_fmt = grid.shape, "yuv420p"
        context, tick = stream.codec_context, 0
        context.color_primaries = context.color_trc = context.colorspace = bt709
        context.color_range = limited
        for k, ticks in shown:
            rgb = av.VideoFrame.from_ndarray(grid.draw(k), format="rgb24")
            for _ in range(ticks):
                frame = rgb.reformat(format="yuv420p", dst_colorspace=bt709, dst_color_range=limited)
                frame.pts, frame.time_base, tick = tick, 1 / rate, tick + 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _save_animation(path: Path, drawn: dict, shown: Playback, fps: float, *, unit: int, **options) -> None:
    """Save an animation that loops for ever; times are whole `unit` ms and their rounding never adds up."""
    ends = np.cumsum([ticks for _, ticks in shown]) * (1000 / (fps * unit))
    # Browsers slow a frame of at most 10 ms down to 100 ms.
    shortest = -(-11 // unit)
    duration = [max(int(units), shortest) * unit for units in np.diff(ends.round(), prepend=0)]
    first, *rest = (drawn[k] for k, _ in shown)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, **options)


def _encode_webp(path: Path, grid: Grid, shown: Playback, fps: float) -> None:
    drawn = {k: Image.fromarray(grid.draw(k)) for k, _ in shown}
    # Without key frames the still sources are stored once.
    options = {"quality": 90, "method": 4, "kmin": 9999, "kmax": 10000}
    _save_animation(path, drawn, shown, fps, unit=1, format="WEBP", **options)


def _encode_gif(path: Path, grid: Grid, shown: Playback, fps: float) -> None:
    """One palette for all frames and no dithering, whose noise would crawl over the tissue in motion."""
    frames = {k: grid.draw(k) for k, _ in shown}
    palette = _shared_palette(frames.values())
    tree = cKDTree(palette[:GIF_UNCHANGED])
    # Pillow's own mapping is off by up to 3 levels a colour and greys the paper; this one is exact.
    nearest = np.full(1 << 24, GIF_UNCHANGED, np.uint8)
    for k, rgb in frames.items():
        codes = rgb @ np.array((1 << 16, 1 << 8, 1), np.int32)
        new = np.unique(codes[nearest[codes] == GIF_UNCHANGED])
        nearest[new] = tree.query(np.stack((new >> 16, new >> 8 & 255, new & 255), 1))[1]
        frames[k] = Image.fromarray(nearest[codes])
        frames[k].putpalette(palette.tobytes())
    options = {"palette": palette.tobytes(), "optimize": True, "transparency": GIF_UNCHANGED, "disposal": 1}
    _save_animation(path, frames, shown, fps, unit=10, format="GIF", **options)


def _shared_palette(frames) -> np.ndarray:
    """256 different colours, uint8 (256, 3): the caption's, then the best for a sample of every frame."""
    rng = np.random.default_rng(0)
    sample = np.concatenate([rng.choice(rgb.reshape(-1, 3), 2**17 // len(frames)) for rgb in frames])
    image = Image.fromarray(sample[None])
    found = image.quantize(250, method=Image.Quantize.MEDIANCUT, kmeans=1).getpalette()
    caption = [bytes.fromhex(colour[1:]) for colour in (PAPER, INK, GREY, TRACK, ACCENT)]
    tissue = [bytes(found[i : i + 3]) for i in range(0, len(found), 3)]
    filler = [bytes((i, 255, 255 - i)) for i in range(256)]
    return np.array([tuple(c) for c in dict.fromkeys(caption + tissue + filler)][:256], np.uint8)

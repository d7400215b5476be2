"""Videos of a Trajectory: a grid of sequences that move together (mp4, webp, gif) and a still strip (png).

Frames are shown as they are, never cross-faded: a blended frame would be an image that no model made.
"""

from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.base.files import replacing
from cellflux_bridge.images import write_png
from cellflux_bridge.images.panels import ACCENT, GREY, INK, PAPER, TRACK, Grid, draw_strip
from cellflux_bridge.trajectory import Trajectory
from cellflux_bridge.video.settings import VideoConfig

FILES = {f: f"interpolation.{f}" for f in ("mp4", "webp", "gif")} | {"strip": "strip.png"}
# Of a GIF's 256 colours the last marks unchanged pixels.
GIF_UNCHANGED = 255

Playback = list[tuple[int, int]]


def write_all(trajectory: Trajectory, folder: Path, video_config: VideoConfig) -> list[Path]:
    """Write every format that the configuration names into `folder` and return the files, in its order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / FILES[name] for name in dict.fromkeys(video_config.formats)]
    for path in paths:
        write_video(trajectory, path, **video_config.model_dump())
    return paths


def write_video(trajectory: Trajectory, path: Path, **settings) -> None:
    """Write the first sequences of a trajectory in the format of the suffix: .mp4, .webp, .gif or .png.

    `settings` are keys of VideoConfig. A .png is the still strip, which heeds only `sequences`, `tile` and `caption`.
    The file appears whole or not at all. Raises UserError for another suffix, a picture too large and a PyAV without
    H.264; OSError passes.
    """
    encoders = {".mp4": _encode_mp4, ".webp": _encode_webp, ".gif": _encode_gif}
    suffix, config = path.suffix.lower(), VideoConfig(**settings)
    layout = config.model_dump(include={"sequences", "tile", "caption"})
    if suffix == ".png":
        write_png(path, draw_strip(trajectory, **layout))
        return
    if suffix not in encoders:
        raise UserError(f"{path}: expected a suffix of {', '.join(encoders)} or .png (a still strip)")
    grid = Grid(trajectory, **layout, columns=config.columns, show_source=config.show_source)
    shown = playback(len(trajectory.levels), fps=config.fps, hold=config.hold, ping_pong=config.ping_pong)
    with replacing(path) as temporary:
        encoders[suffix](temporary, grid, shown, config.fps)


def playback(num_frames: int, *, fps: float, hold: float, ping_pong: bool) -> Playback:
    """(frame, ticks of 1 / fps that it stays) in the order shown; a loop joins the end to the start.

    Forward and, with `ping_pong`, back: 0 1 2 3 2 1, where 0 and 3 stay `hold` seconds, at least a tick.
    """
    held, last = max(1, round(hold * fps)), num_frames - 1
    forward = [(k, held if k in (0, last) else 1) for k in range(num_frames)]
    return forward + (forward[-2:0:-1] if ping_pong else [])


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
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17", "preset": "slow"})
        (stream.height, stream.width), stream.pix_fmt = grid.shape, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = bt709 = 1
        context.color_range = limited = 1
        rgb = ((av.VideoFrame.from_ndarray(grid.draw(k), format="rgb24"), ticks) for k, ticks in shown)
        for tick, picture in enumerate(chain.from_iterable(repeat(*pair) for pair in rgb)):
            frame = picture.reformat(format="yuv420p", dst_colorspace=bt709, dst_color_range=limited)
            frame.pts, frame.time_base = tick, 1 / rate
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

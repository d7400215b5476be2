"""Videos decode to what was asked: the trajectory's own frames, in order, for as long as they should stay."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import resize, to_rgb
from cellflux_bridge.images.panels import MAX_SIDE, Grid, draw_strip
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, linear_soft_labels
from cellflux_bridge.video.encode import playback, write_all, write_video
from cellflux_bridge.video.settings import VideoConfig

BARE = {"caption": False, "show_source": False}
CAPTIONED = {"sequences": 12, "columns": None, "tile": 32, "caption": True, "show_source": True}


def trajectory(frames=5, sequences=3, height=32, width=32, channels=3, source="normal", target="tumour"):
    """Smooth random textures, a new one in every frame, so that no frame resembles another or a blend."""
    rng = np.random.default_rng(7)
    light = rng.integers(60, 200, (frames * sequences, 5, 5, 1), dtype=np.uint8)
    coarse = light + np.array((50, 0, 30), np.uint8)
    smooth = np.stack([resize(image, height, width) for image in coarse])[..., [0, 1, 2, 0, 1]]
    images = smooth.reshape(frames, sequences, height, width, 5).transpose(0, 1, 4, 2, 3)[:, :, :channels]
    levels = tuple(np.linspace(0, 1, frames).tolist())
    header = TrajectoryHeader("path", source, target, (source, target), levels, "hash")
    ids = tuple(f"{b}.png" for b in range(sequences))
    labels, cost = linear_soft_labels(header, sequences), (0,) * sequences
    return Trajectory(header, np.ascontiguousarray(images), labels, ids, cost, cost)


def decode_mp4(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def decode_animation(path):
    """(frames, milliseconds of each) of a webp or gif."""
    with Image.open(path) as image:
        frames, durations = [], []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            frames.append(np.array(image.convert("RGB")))
            durations.append(image.info["duration"])
        assert image.info["loop"] == 0
    return frames, durations


def distance(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def indices_shown(decoded, grid, num_frames):
    """For every decoded picture the one frame that it shows; fails where it shows none or a blend."""
    drawn = [grid.draw(k) for k in range(num_frames)]
    indices = []
    for picture in decoded:
        distances = [distance(picture, frame) for frame in drawn]
        # Frames lie some 26 levels apart, an even blend 13 from both.
        assert min(distances) < 3 < 20 < sorted(distances)[1]
        indices.append(int(np.argmin(distances)))
    return indices


@pytest.mark.parametrize(
    ("ping_pong", "hold", "expected"),
    [
        (False, 0, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (True, 0, [(0, 1), (1, 1), (2, 1), (3, 1), (2, 1), (1, 1)]),
        (True, 0.5, [(0, 5), (1, 1), (2, 1), (3, 5), (2, 1), (1, 1)]),
    ],
)
def test_playback_holds_the_ends_and_doubles_none(ping_pong, hold, expected):
    assert playback(4, fps=10, hold=hold, ping_pong=ping_pong) == expected


def test_playback_of_two_frames_and_of_one():
    assert playback(2, fps=10, hold=0.2, ping_pong=True) == [(0, 2), (1, 2)]
    assert playback(1, fps=10, hold=0.2, ping_pong=True) == [(0, 2)]


def test_mp4_is_h264_that_browsers_play(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(trajectory(), path, fps=12.5, hold=0.4, tile=33, ping_pong=True)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(25, 2)
        assert stream.width % 2 == stream.height % 2 == 0
        assert stream.codec_context.colorspace == 1
        assert len(list(container.decode(video=0))) == 2 * 5 + 2 * 3
        assert container.duration / 1e6 == pytest.approx(16 / 12.5, abs=0.01)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_every_picture_is_a_frame_of_the_trajectory(tmp_path, suffix):
    made = trajectory()
    path = tmp_path / f"a{suffix}"
    write_video(made, path, tile=32, hold=0.3, ping_pong=True, **BARE)
    decoded = decode_mp4(path) if suffix == ".mp4" else decode_animation(path)[0]
    grid = Grid(made, sequences=12, columns=None, tile=32, **BARE)
    expected = [0, 0, 0, 1, 2, 3, 4, 4, 4, 3, 2, 1] if suffix == ".mp4" else [0, 1, 2, 3, 4, 3, 2, 1]
    assert indices_shown(decoded, grid, 5) == expected


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_times(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(trajectory(frames=6), path, fps=8, hold=0.5, ping_pong=False, tile=32, **BARE)
    _, durations = decode_animation(path)
    assert len(durations) == 6
    assert (durations[0], durations[-1], sum(durations)) == (500, 500, 1500)
    assert all(abs(ms - 125) <= 5 for ms in durations[1:-1])


def test_first_picture_shows_the_source_beside_the_moving_tile(tmp_path):
    made = trajectory(frames=3, sequences=1)
    write_video(made, tmp_path / "a.mp4", tile=64, hold=0, ping_pong=False)
    grid = Grid(made, sequences=1, columns=None, tile=64, caption=True, show_source=True)
    top, left = grid.places[0]
    for k, picture in enumerate(decode_mp4(tmp_path / "a.mp4")):
        rows = picture[top : top + 64]
        for shown, x in ((0, left - grid.step), (k, left)):
            assert distance(rows[:, x : x + 64], resize(made.sequence(0)[shown], 64, 64)) < 4


def test_gif_shows_white_and_still_tiles_without_noise(tmp_path):
    write_video(trajectory(frames=4), tmp_path / "a.gif", tile=32)
    grid = Grid(trajectory(frames=4), **CAPTIONED)
    frames, _ = decode_animation(tmp_path / "a.gif")
    (top, left), side = grid.places[0], 32
    for frame in frames:
        source = np.s_[top : top + side, left - grid.step : left - grid.step + side]
        assert (frame[source] == frames[0][source]).all()
        assert (frame[: grid.gap] == 255).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(33, 17), (9, 32)])
def test_odd_and_oblong_frames_of_any_channels(height, width, channels):
    made = trajectory(frames=2, height=height, width=width, channels=channels)
    grid = Grid(made, sequences=9, columns=2, tile=max(height, width), **BARE)
    picture = grid.draw(1)
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    for b, (top, left) in enumerate(grid.places):
        assert (picture[top : top + height, left : left + width] == to_rgb(made.sequence(b)[1])).all()


def test_odd_frames_encode(tmp_path):
    made = trajectory(frames=2, sequences=1, height=7, width=5, channels=1)
    for suffix in (".mp4", ".webp", ".gif", ".png"):
        write_video(made, tmp_path / f"a{suffix}", tile=7, hold=0, **BARE)
        assert (tmp_path / f"a{suffix}").stat().st_size > 0


def test_grid_tiles_do_not_overlap_and_fill_the_columns():
    made = trajectory(frames=2, sequences=12)
    grid = Grid(made, **CAPTIONED)
    assert len(set(grid.places)) == 12
    assert 1 < grid.shape[1] / grid.shape[0] < 2.5
    lefts = [left for _, left in Grid(made, **CAPTIONED | {"columns": 5}).places]
    assert len(set(lefts)) == 5
    assert len(Grid(made, **CAPTIONED | {"sequences": 4}).places) == 4


def test_caption_progresses_with_the_level():
    grid = Grid(trajectory(), **CAPTIONED)
    tinted = [(grid.draw(k)[: grid.places[0][0]] == (98, 74, 140)).all(2).sum() for k in range(5)]
    assert tinted[0] == 0
    assert np.diff(tinted) == pytest.approx(tinted[-1] / 4, rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 31)])
def test_strip_is_pixel_exact_where_nothing_is_enlarged(tmp_path, height, width):
    made = trajectory(frames=33, sequences=2, height=height, width=width)
    tile = max(height, width)
    write_video(made, tmp_path / "strip.png", tile=tile, caption=False)
    with Image.open(tmp_path / "strip.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        picture = np.array(image)
    gap, margin = 2, 4
    chosen = [0, 3, 6, 10, 13, 16, 19, 22, 26, 29, 32]
    assert picture.shape == (2 * (height + gap) - gap + 2 * margin, 11 * (width + gap) - gap + 2 * margin, 3)
    for b in range(2):
        for j, k in enumerate(chosen):
            top, left = margin + b * (height + gap), margin + j * (width + gap)
            assert (picture[top : top + height, left : left + width] == made.sequence(b)[k]).all()


def test_strip_of_few_frames_shows_each_under_a_header():
    made = trajectory(frames=3, sequences=1)
    bare = draw_strip(made, sequences=1, tile=128, caption=False)
    captioned = draw_strip(made, sequences=1, tile=128, caption=True)
    header = captioned.shape[0] - bare.shape[0]
    assert bare.shape[1] == captioned.shape[1] == 3 * 128 + 2 * 4 + 2 * 10
    assert (captioned[header:] == bare)[10:].all()
    assert (captioned[: header + 10] < 128).any()


@pytest.mark.parametrize("name", ["x" * 500, "many words " * 40, "", "léger / modéré", "正常", "a\nb"])
@pytest.mark.parametrize("tile", [24, 64])
def test_class_names_never_overflow(name, tile):
    made = trajectory(frames=2, sequences=1, source=name, target=name[::-1])
    grid = Grid(made, **CAPTIONED | {"tile": tile})
    # Also where name and level meet: the column before the level stays white.
    level = grid.shape[1] - grid.gap - int(grid.font.getlength("level 0.00")) - 4
    text = grid.draw(0)[: grid.gap + round(grid.font.size * 1.5)]
    assert (text[:, level : level + 2] == 255).all()
    strip = draw_strip(made, sequences=1, tile=tile, caption=True)
    for picture in (text, strip):
        assert (picture[:, :3] == 255).all()
        assert (picture[:, -3:] == 255).all()


def test_unknown_suffix_names_the_valid_ones(tmp_path):
    with pytest.raises(UserError, match=r"a\.avi: .*\.mp4, \.webp, \.gif or \.png"):
        write_video(trajectory(), tmp_path / "a.avi")
    assert not os.listdir(tmp_path)


def test_too_large_a_picture_is_refused_before_it_is_drawn():
    with pytest.raises(UserError, match=f"more than {MAX_SIDE}"):
        Grid(trajectory(), **CAPTIONED | {"tile": MAX_SIDE})


def test_no_h264_encoder_is_said(tmp_path, monkeypatch):
    def missing(name, mode):
        raise ValueError(name)

    monkeypatch.setattr(av, "Codec", missing)
    with pytest.raises(UserError, match=r"no H\.264 encoder"):
        write_video(trajectory(), tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif", ".png"])
def test_missing_folder_is_an_os_error_that_names_the_file(tmp_path, suffix):
    with pytest.raises(OSError, match="nowhere"):
        write_video(trajectory(), tmp_path / "nowhere" / f"a{suffix}")


@pytest.mark.parametrize("name", ["a.webp", "a.mp4", "a.png"])
def test_no_picture_is_written_through_a_link(tmp_path, name):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f"{name}.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    write_video(trajectory(frames=2, sequences=1), tmp_path / name, tile=16, hold=0)
    assert (tmp_path / "precious").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [name, "precious"]


def test_write_all_writes_what_the_configuration_names(tmp_path):
    config = VideoConfig(formats=["strip", "mp4", "gif", "webp", "mp4"], tile=32, sequences=2)
    paths = write_all(trajectory(frames=3), tmp_path / "video", config)
    assert [path.name for path in paths] == [
        "strip.png", "interpolation.mp4", "interpolation.gif", "interpolation.webp",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "video")) == sorted(path.name for path in paths)

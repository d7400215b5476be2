"""Images of any number of channels: read, cached, trained on, translated, shown."""

import numpy as np
import pytest

from cellflux_bridge import cli, images
from cellflux_bridge.api import Bridge
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.metrics.evaluate import require_rgb
from cellflux_bridge.trajectory import load_trajectory

NUM = 5


@pytest.fixture
def cells(tmp_path):
    """root/<A, B>/*.npy of five channels; class B is brighter in the last one."""
    rng = np.random.default_rng(0)
    for label in "AB":
        (tmp_path / "patches" / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 60, (16, 16, NUM), dtype=np.uint8)
            pixels[..., -1] += 120 * (label == "B")
            np.save(tmp_path / "patches" / label / f"{number}.npy", pixels)
    return tmp_path / "patches"


def test_every_channel_is_resized_by_itself_as_the_three_of_rgb_are():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 20, 6), dtype=np.uint8)
    for size in ((6, 10), (24, 40)):
        found = images.resize(pixels, *size)
        assert found.shape == (*size, 6)
        assert np.array_equal(found[..., :3], images.resize(pixels[..., :3], *size))
        assert np.array_equal(found[..., 3:], images.resize(pixels[..., 3:], *size))


def test_the_cache_holds_what_the_files_hold(cells, data_config):
    config = data_config(cells, channels=NUM)
    patches = load_patches(config, seed=0)
    assert patches.pixels.shape == (24, 16, 16, NUM)
    for number in (0, 23):
        assert np.array_equal(patches.pixels[number], np.load(cells / patches.ids[number]))
    assert patches.centre([0, 1]).shape == (2, NUM, 16, 16)
    assert patches.preprocessing == Preprocessing(16, channels=NUM)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (3, r"\(16, 16, 5\); data\.channels=3 is \(H, W, 3\) or \(H, W\)"),
        (4, r"\(16, 16, 5\); data\.channels=4 is \(H, W, 4\)"),
    ],
)
def test_another_number_of_channels_is_told(cells, data_config, channels, message):
    with pytest.raises(UserError, match=message):
        load_patches(data_config(cells, channels=channels), seed=0)


def test_a_picture_is_no_file_of_five_channels(tmp_path):
    images.write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a picture; data\.channels=5 is read from \.npy files"):
        images.read(tmp_path / "a.png", channels=NUM)
    np.save(tmp_path / "grey.npy", np.ones((4, 6), np.uint8))
    assert images.read(tmp_path / "grey.npy", channels=1).shape == (4, 6, 1)


def test_a_flow_of_five_channels_trains_translates_and_is_shown(cells, tmp_path, write_config, capsys):
    sections = {"data": {"channels": NUM, "split": {"val": 0.25, "test": 0.25}}, "condition": {"target": "level"}}
    translate = {"method": "progression", "levels": 2, "steps": 1, "solver": "euler", "num": 2}
    config = str(write_config(tmp_path, **sections, translate=translate, video={"formats": ["strip"]}))
    cli.main(["data", "check", config])
    assert "training can start" in capsys.readouterr().out
    cli.main(["train", config])
    run = tmp_path / "runs" / "tiny"
    cli.main(["translate", str(run), "--source", "A", "--target", "B"])
    folder = next((run / "trajectories").iterdir())
    frames = load_trajectory(folder).frames
    assert frames.shape == (3, 2, NUM, 16, 16)
    assert sorted(path.suffix for path in (folder / "frames").glob("*/*")) == [".npy"] * 6
    cli.main(["video", str(run)])
    assert images.read_rgb(folder / "strip.png").shape[2] == 3
    bridge = Bridge.load(run)
    one = np.load(cells / "A" / "0.npy")
    assert bridge.translate(one, source="A", target="B").frames.shape == (3, 1, NUM, 16, 16)
    with pytest.raises(UserError, match=r"expected uint8 \(H, W, 5\), found uint8 \(16, 16, 3\)"):
        bridge.translate(one[..., :3], source="A", target="B")
    with pytest.raises(UserError, match="5 channels; evaluate's figures are of RGB images only"):
        require_rgb(folder)
    with pytest.raises(SystemExit, match="5 channels; nuclei are counted in RGB"):
        cli.main(["cellularity", str(folder)])

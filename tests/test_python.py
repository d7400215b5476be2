"""The package in Python: train, translate whatever is at hand, and look at, keep and tabulate what comes out."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellflux_bridge import Bridge, cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.images import read_rgb, write_png
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, load_trajectory

ROOT = Path(__file__).parent.parent
# A network and a schedule for seconds.
TINY = ["data.image_size=16", "data.split.val=.25", "data.split.test=.25", "velocity.channels=8", "pairs.pool=1"]
TINY += ["velocity.multipliers=[1, 1]", "velocity.attention=[]", "train.batch_size=8", "train.validate_pairs=4"]
TINY += ["classifier.train.steps=4", "classifier.train.batch_size=8", "translate.steps=1", "translate.levels=3"]
TINY += ["refiner.train.steps=2", "refiner.velocity.channels=8"]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, make_patches) -> Bridge:
    root = tmp_path_factory.mktemp("python")
    make_patches(root / "patches", num={"benign": 16, "malignant": 16, "other": 4})  # a class that is left out
    options = {"source": "malignant", "target": "benign", "steps": 2, "device": "cpu"}
    caches = f"data.cache_dir={root / 'cache'}"
    return Bridge.train(root / "patches", output=root / "run", overrides=[*TINY, caches], **options)


def folder_of(bridge: Bridge) -> Path:
    return bridge.config.data.root


def test_a_folder_of_patches_is_all_that_training_needs(bridge):
    assert bridge.classes == ("malignant", "benign")
    assert bridge.config.name == "patches"
    trajectory = bridge.translate(folder_of(bridge) / "malignant")
    assert (trajectory.header.source, trajectory.header.target) == ("malignant", "benign")
    others = [name.partition("@")[0] for name in trajectory.header.config_hash.split("+")[1:]]
    assert others == ["guide_rgb", "refiner"]  # which were trained, too
    assert trajectory.source_ids == tuple(sorted(f.name for f in (folder_of(bridge) / "malignant").iterdir()))


def test_minutes_end_a_training_and_the_learning_rate_does_not_fall(bridge, tmp_path):
    options = {"minutes": 0.001, "output": tmp_path / "run", "overrides": TINY}
    config = Bridge.train(folder_of(bridge), source="benign", target="malignant", **options).config
    assert (config.train.max_minutes, config.train.lr_decay) == (0.001, "none")
    with pytest.raises(UserError, match="no patch of class 'begnin' in"):
        Bridge.train(folder_of(bridge), source="begnin", target="malignant", **options)


def test_the_packages_own_configuration_is_the_one_that_users_copy():
    assert (ROOT / "cellflux_bridge/config/own.yaml").read_bytes() == (ROOT / "configs/own.yaml").read_bytes()


def test_one_image_is_translated_in_whatever_form_it_is(bridge):
    file = sorted((folder_of(bridge) / "malignant").iterdir())[0]
    rgb = read_rgb(file)
    first = bridge.translate(file, ids=["a"])
    assert first.frames.shape == (4, 1, 3, 16, 16)
    for image in (str(file), rgb, Image.fromarray(rgb), [Image.fromarray(rgb)], rgb[None]):
        np.testing.assert_array_equal(bridge.translate(image, ids=["a"]).frames, first.frames)


def test_a_users_folder_is_translated_by_the_command(bridge, tmp_path, capsys):
    images, run = tmp_path / "mine", str(bridge.config.output)
    (images / "deep").mkdir(parents=True)
    for name, colour in (("a.png", 90), ("deep/a.png", 200)):
        write_png(images / name, np.full((20, 30, 3), colour, np.uint8))
    cli.main(["translate", run, "--images", str(images)])
    written = bridge.config.output / "trajectories" / "malignant_to_benign_progression_of_mine"
    assert "(2, 2 made now" in capsys.readouterr().out
    assert load_trajectory(written).source_ids == ("a.png", "deep/a.png")
    write_png(images / "b.png", np.full((20, 30, 3), 10, np.uint8))
    cli.main(["translate", run, "--images", str(images)])
    assert "(3, 1 made now" in capsys.readouterr().out
    expected = bridge.translate(images)
    for name in expected.source_ids:
        made = load_trajectory(written, source_ids=[name]).frames[:, 0].astype(int)
        assert np.abs(made - expected.frames[:, expected.source_ids.index(name)]).max() <= 1
    (images / "broken.png").write_bytes(b"")
    (images / "small.tif").write_bytes(b"II")
    with pytest.raises(SystemExit, match=r"(?s)2 of 5 images cannot be used; mend.*broken\.png.*small\.tif"):
        cli.main(["translate", run, "--images", str(images)])


HEADER = TrajectoryHeader("path", "A", "B", ("B", "A"), (0.0, 0.25, 1.0), "hash")


def made(*ids: str, depths: bool = False) -> Trajectory:
    num = len(ids)
    frames = np.arange(3 * num, dtype=np.uint8).reshape(3, num, 1, 1, 1) * np.ones((3, 8, 8), np.uint8)
    labels = np.array([[0, 1], [0.25, 0.75], [1, 0]], np.float32)[:, None].repeat(num, axis=1)
    kept = np.arange(3.0 * num).reshape(3, num) if depths else None
    return Trajectory(HEADER, frames, labels, ids, tuple(range(num)), (0,) * num, kept)


def test_soft_labels_go_by_the_name_of_the_class():
    np.testing.assert_array_equal(made("x", "y").soft_labels_of("B"), [[0, 0], [0.25, 0.25], [1, 1]])
    with pytest.raises(UserError, match="'C': no class of this trajectory; its classes are B, A"):
        made("x").soft_labels_of("C")


def test_a_trajectory_is_saved_and_loaded(tmp_path):
    made("x", "y", depths=True).save(tmp_path / "t")
    found = Trajectory.load(str(tmp_path / "t"))
    for name in ("frames", "soft_labels", "depths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made("x", "y", depths=True), name))
    made("y", "z").save(tmp_path / "t")  # only z is new
    assert Trajectory.load(tmp_path / "t").source_ids == ("x", "y", "z")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds no trajectory"):
        made("x").save(tmp_path / "other")


def test_a_trajectory_as_a_table():
    table = made("x", "y", depths=True).to_dataframe()
    assert list(table.columns) == ["source_id", "level", "p_B", "p_A", "nfe", "gradients", "depth"]
    row = table[(table.source_id == "y") & (table.level == 0.25)].iloc[0]
    assert (row.p_B, row.p_A, row.nfe, row.depth) == (0.25, 0.75, 1, 3)
    assert made("x").to_dataframe().depth.isna().all()


def test_a_trajectory_as_pictures(tmp_path):
    trajectory = made("x", "y")
    strip = trajectory.strip(tmp_path / "strip.png", sequences=2)
    np.testing.assert_array_equal(read_rgb(tmp_path / "strip.png"), np.asarray(strip))
    assert trajectory.video(tmp_path / "v.gif", tile=16, columns=2) == tmp_path / "v.gif"
    assert (tmp_path / "v.gif").stat().st_size > 100


def test_a_trajectory_says_in_a_line_what_it_is():
    assert repr(made("x", "y")) == "Trajectory(A -> B, path: 2 sequences of 3 frames, 3 x 8 x 8)"


def test_a_notebook_shows_one_picture_a_level_and_escapes_names():
    html = made(*"abcdefghij")._repr_html_()
    assert html.count("<img") == 3
    assert html.count(" hidden>") == 2
    assert re.search(r'max="2" value="0"', html)
    assert "8 of 10 sequences" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    header = TrajectoryHeader("path", "<b>", "B", ("<b>", "B"), (0.0, 0.5, 1.0), "")
    one = made("x")
    assert "<b>" not in Trajectory(header, one.frames, one.soft_labels, *one_of(one))._repr_html_()


def one_of(trajectory: Trajectory) -> tuple:
    return trajectory.source_ids, trajectory.nfe, trajectory.gradients

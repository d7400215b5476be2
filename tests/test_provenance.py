"""Real patches come from where the sequences came from, or from where the user says."""

from pathlib import Path

import pytest
import torch

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.config import load_config
from cellflux_bridge.metrics.evaluate import evaluate
from cellflux_bridge.metrics.loading import require_same_data
from cellflux_bridge.trajectory import TrajectoryHeader, TrajectoryWriter

PHANTOM = "data.layout={name: phantom, num_test: 3}"


@pytest.fixture
def configured(tmp_path, write_config):
    """`configured("name", "key=value", ...)`: a folder that holds a configuration and, as a run, empty weights."""

    def make(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = load_config(write_config(tmp_path), ["data.classes=[A, B]", *overrides])
        (folder / checkpoint.CONFIG).write_text(config.to_yaml())
        (folder / checkpoint.WEIGHTS).touch()
        return folder

    return make


@pytest.mark.parametrize(("key", "override"), [("root", "data.root=/elsewhere"), ("layout", PHANTOM)])
def test_another_data_set_is_refused_unless_the_user_decides(configured, tmp_path, key, override):
    made, judge = configured("made", override), configured("judge")
    with pytest.raises(UserError, match=rf"made: was made from data\.{key}=.*judge would compare it") as refusal:
        require_same_data([made], [judge], [])
    # Each of the overrides that the error names is one that helps.
    offered = str(refusal.value).partition("which are meant: ")[2].split(" or ")
    assert offered[0].startswith(f"data.{key}=")
    for text in offered:
        require_same_data([made], [judge], [text])
        load_config(judge / checkpoint.CONFIG, [text])
    with pytest.raises(UserError, match=rf"data\.{key}="):
        require_same_data([made], [judge], ["data.image_size=16"])
    with pytest.raises(UserError, match="other"):
        require_same_data([judge, made], [judge, configured("other", override)], [])


def test_one_place_has_many_spellings_and_frames_of_ones_own_have_none(configured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_same_data([configured("made", "data.root=patches")], [configured("judge", "data.crop=12")], [])
    made = configured("made", "data.root=patches", "data.layout={name: folder, ignore: [C]}")
    require_same_data([made], [configured("judge", "data.crop=12")], [])  # of more classes
    (tmp_path / "own").mkdir()
    require_same_data([tmp_path / "own"], [configured("judge", "data.root=/elsewhere")], [])


def test_evaluate_asks_before_it_loads_anything(configured, tmp_path):
    header = TrajectoryHeader(
        method="path", source="A", target="B", classes=("A", "B"), levels=(0.0, 1.0), config_hash="x"
    )
    TrajectoryWriter(tmp_path / "made", header)
    made = configured("made", "data.root=/elsewhere")
    judge, features = configured("judge"), configured("features")
    with pytest.raises(UserError, match=r"made: was made from data\.root=/elsewhere"):
        evaluate([made], judges=[judge], features=features, device=torch.device("cpu"))

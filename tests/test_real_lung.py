"""The lung configuration on real H&E patches; skipped where they are not at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from cellflux_bridge.api import Bridge
from cellflux_bridge.cli import main
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches

ROOT = Path(os.environ.get("CELLFLUX_BRIDGE_DATA", "")) / "lc25000_lung"
pytestmark = pytest.mark.skipif(
    "CELLFLUX_BRIDGE_DATA" not in os.environ or not ROOT.is_dir(),
    reason="CELLFLUX_BRIDGE_DATA names no folder that holds lc25000_lung",
)
CONFIG = Path(__file__).parents[1] / "configs" / "lung.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_no_original_tile_stands_in_two_splits(cache):
    config = load_config(CONFIG, [f"data.root={ROOT}", f"data.cache_dir={cache}"])
    patches = load_patches(config.data, seed=config.seed)
    assert patches.classes == ("lung_n", "lung_aca", "lung_scc")
    groups = [set(patches.groups[patches.indices(split)].tolist()) for split in ("train", "val", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert (
        min(len(patches.indices(split, label)) for split in ("train", "val", "test") for label in patches.classes) > 100
    )
    # The file's own pixels at the network's scale: 224 px tiles, of which one patch shows `crop`.
    assert patches.pixels.shape[1] == round(224 * config.data.image_size / config.data.crop)


def test_a_few_steps_of_the_lung_run(cache, tmp_path):
    small = ["velocity.channels=16", "train.steps=3", "train.batch_size=12", "train.validate_pairs=12"]
    places = [f"data.root={ROOT}", f"data.cache_dir={cache}", f"output={tmp_path / 'run'}"]
    main(["train", str(CONFIG), *places, *small, "translate.num=2", "translate.steps=4", "translate.frames=5"])
    bridge = Bridge.load(tmp_path / "run")
    folder, figures = bridge.translate_split(source="lung_n", target="lung_aca")
    assert figures["sequences"] == 2
    source = next((ROOT / "test" / "lung_n").glob("*.jpeg"))
    trajectory = bridge.translate([source], source="lung_n", target="lung_scc")
    assert trajectory.frames.shape[1:] == (1, 3, 32, 32)
    assert np.ptp(trajectory.frames[-1]) > 0
    assert len(list(folder.glob("frames/*/*.png"))) == 2 * 5

"""The lung configuration on real H&E patches; skipped where they are not at hand."""

import csv
import os
import shutil
from collections import Counter
from itertools import groupby
from operator import itemgetter
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
    assert patches.classes == ("lung_n", "lung_aca")
    groups = [set(patches.groups[patches.indices(split)].tolist()) for split in ("train", "val", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert (
        min(len(patches.indices(split, label)) for split in ("train", "val", "test") for label in patches.classes) > 100
    )
    # The file's own pixels at the network's scale: 224 px tiles, of which one patch shows `crop`.
    assert patches.pixels.shape[1] == round(224 * config.data.image_size / config.data.crop)


@pytest.fixture
def few_tiles(tmp_path) -> Path:
    """At least 24 patches of each class and split, in whole tiles, with their manifest."""
    with open(ROOT / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kept, num = [], Counter()
    for _, tile in groupby(sorted(rows, key=itemgetter("group")), key=itemgetter("group")):
        tile = list(tile)
        kind = tile[0]["split"], tile[0]["label"]
        if num[kind] < 24:
            kept += tile
            num[kind] += len(tile)
    for row in kept:
        (tmp_path / "tiles" / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / row["path"], tmp_path / "tiles" / row["path"])
    with open(tmp_path / "tiles" / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(kept)
    return tmp_path / "tiles"


def test_a_few_steps_of_the_lung_run(few_tiles, tmp_path):
    run = tmp_path / "run"
    places = [f"data.root={few_tiles}", f"data.cache_dir={tmp_path}/cache"]
    small = ["velocity.channels=16", "train.steps=3", "train.batch_size=12", "train.validate_pairs=12", "pairs.pool=2"]
    short = ["classifier.train.steps=4", "classifier.train.batch_size=16", "classifier.train.warmup_steps=1"]
    small += ["refiner.train.steps=3", "refiner.velocity.channels=8"]
    main(["train", str(CONFIG), *places, f"output={run}", *small, *short])
    for view in ("rgb", "grey"):
        main(["train-classifier", str(run), *places, "classifier.role=guide", f"classifier.view={view}", *short])
    few = ["translate.num=2", "translate.levels=3", "translate.steps=2"]
    folder, figures = Bridge.load(run, [*places, *few]).translate_split()
    assert figures["sequences"] == 2
    assert len(list(folder.glob("frames/*/*.png"))) == 2 * 4
    source = next((few_tiles / "test" / "lung_n").glob("*.jpeg"))
    trajectory = Bridge.load(run, few).translate([source])  # the calibration is kept in the run: no patches are needed
    assert trajectory.frames.shape == (4, 1, 3, 32, 32)
    assert np.ptp(trajectory.frames[-1]) > 0

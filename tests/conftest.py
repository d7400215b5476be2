"""Small made data sets and configurations that tests of every room share."""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import yaml

from cellflux_bridge.config.root import merged
from cellflux_bridge.data.settings import DataConfig
from cellflux_bridge.images import write_png

torch.set_num_threads(1)

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_COLOURS = {"A": (225.0, 165.0, 205.0), "B": (140.0, 90.0, 170.0)}


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Tests leave nothing in their user's home, where caches of received runs go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # its list of fonts takes seconds to make
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def _smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.normal(size=(height // 4 + 2, width // 4 + 2))
    return np.kron(coarse, np.ones((4, 4)))[:height, :width]


@pytest.fixture(scope="session")
def make_patches() -> Callable[..., Path]:
    """`make_patches(root, num={"A": 24, "B": 24}, low=16, high=24, seed=0)` writes root/<class>/<class><n>.png.

    Class A is pale and pink, every other class dark and violet; sides are drawn from low..high pixels.
    """

    def make(root: Path, *, num: Mapping[str, int] | None = None, low: int = 16, high: int = 24, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for label, count in ({"A": 24, "B": 24} if num is None else num).items():
            (root / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                height, width = rng.integers(low, high + 1, 2)
                texture = 18 * _smooth(rng, height, width)[:, :, None] + rng.normal(0, 4, (height, width, 3))
                rgb = np.clip(_COLOURS.get(label, _COLOURS["B"]) + texture, 1, 254).astype(np.uint8)
                write_png(root / label / f"{label}{number:03d}.png", rgb)
        return root

    return make


@pytest.fixture
def patch_folder(tmp_path, make_patches) -> Path:
    """root/<A, B>/*.png, 24 patches of 16 to 24 px a class."""
    return make_patches(tmp_path / "patches")


@pytest.fixture(scope="session")
def write_config() -> Callable[..., Path]:
    """`write_config(tmp_path, data={...}, train={...}) -> Path` of a complete small run in YAML.

    A section that is given is merged over the small defaults, key by key; other values, and components of another name,
    replace them.
    """

    def write(tmp_path: Path, *, file: str = "tiny.yaml", **sections: Any) -> Path:
        data: dict[str, Any] = {
            "output": str(tmp_path / "runs" / "tiny"),
            "data": {"root": str(tmp_path / "patches"), "image_size": 16, "cache_dir": str(tmp_path / "cache")},
            "velocity": {"name": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": []},
            "train": {"steps": 4, "batch_size": 8, "warmup_steps": 0, "accelerator": "cpu", "sample_every": 0},
        }
        path = tmp_path / file
        path.write_text(yaml.safe_dump(merged(data, sections), sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data_config(tmp_path) -> Callable[..., DataConfig]:
    """`data_config(root, **keys)`: a `data` section at 16 px whose cache lies in the test's own folder."""

    def make(root: Path, **keys: Any) -> DataConfig:
        return DataConfig.model_validate({"root": root, "image_size": 16, "cache_dir": tmp_path / "cache", **keys})

    return make


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: install the system's package (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root cannot have Chromium's sandbox.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()

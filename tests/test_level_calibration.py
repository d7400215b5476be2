"""What is measured before a progression: kept with its run, made anew where anything differs, measured by one."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.codec.pixels import Pixels
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.field.settings import GuidanceConfig
from cellflux_bridge.training.loop import from_rank_zero
from cellflux_bridge.translation.level_calibration import LevelCalibration
from cellflux_bridge.translation.settings import TranslateConfig
from cellflux_bridge.transport.base import Result
from cellflux_bridge.transport.progression import Progression

SETTINGS = TranslateConfig(source="A", target="B", method="progression", calibrate="probability", levels=4)
LEVELS = torch.linspace(0, 1, 5)


class Processes:
    """Fabric's broadcast among threads that stand for processes."""

    def __init__(self, num: int):
        self._barrier, self._sent = Barrier(num, timeout=60), None
        self.printed: list[str] = []

    def __getitem__(self, rank: int) -> SimpleNamespace:
        def broadcast(value):
            if rank == 0:
                self._sent = value
            self._barrier.wait()
            value = self._sent
            self._barrier.wait()
            return value

        return SimpleNamespace(
            is_global_zero=rank == 0,
            device=torch.device("cpu"),
            broadcast=broadcast,
            autocast=nullcontext,
            print=self.printed.append,
        )


class Guide(nn.Module):
    """p(B) is a power of darkness, and the feature is darkness itself; both 0 for white and 1 for black."""

    def __init__(self, power: float):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power), requires_grad=False)

    def features(self, x):
        return (1 - x.mean((1, 2, 3)))[:, None] / 2

    def log_probabilities(self, x):
        p = (self.features(x) ** self.power).clamp(1e-6, 1 - 1e-6)
        return torch.cat([1 - p, p], dim=1).log()


class Patches:
    ids = ("a", "b")

    def sample(self, split, label, *, num, seed):
        assert split == "val"
        return np.arange(2)

    def centre(self, chosen):
        return torch.zeros(len(chosen), 3, 8, 8, dtype=torch.uint8)


@pytest.fixture
def config(tmp_path, write_config) -> Config:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    return load_config(write_config(tmp_path), ["data.classes=[A, B]"])


class Meter:
    """Level calibrations of one flow, whose network makes images of darkness c^2; `made` lists its measurements."""

    def __init__(self, config, fabric, weight, power, guide, patches):
        self.made, self._memory, self.guides = [], {}, SimpleNamespace()
        self.guides.named = lambda guidance, *, sees: [f"{guide}:{power}"]
        self.guides.load = lambda guidance, *, sees: [Guide(power)]
        self._how = {"config": config, "fabric": fabric, "weights": str(weight), "patches": patches}

    def make(self, x0, *, noise, conditions):
        self.made.append(len(x0))
        frames = (1 - 2 * conditions**2).view(-1, 1, 1, 1, 1).expand(len(conditions), *x0.shape)
        return Result(torch.cat([x0[None], frames]), 1, 0)

    def of(self, settings: TranslateConfig) -> LevelCalibration:
        how = {"guides": self.guides, "codec": Pixels(3), "memory": self._memory, **self._how}
        return LevelCalibration(settings=settings, **how)

    def conditions(self, settings: TranslateConfig) -> torch.Tensor:
        """The conditions that a progression has for LEVELS."""
        return self.method(**settings.of("progression"))._conditions(LEVELS, None, self.of(settings))

    def adaptive(self, settings: TranslateConfig) -> tuple[float, ...]:
        adaptive = {**settings.of("progression"), "spacing": "adaptive"}
        return self.method(**adaptive).levels(None, self.of(settings))

    def method(self, **keys) -> Progression:
        method = Progression(**keys)
        method._to_conditions = lambda flow, x0, **options: self.make(x0, **options)
        return method


@pytest.fixture
def meter(config):
    def make(*, weight=1.0, power=2.0, guide="guide_rgb@9", fabric=None, seed=0, patches=Patches) -> Meter:
        seeded = config.model_copy(update={"seed": seed})
        return Meter(seeded, fabric or Processes(1)[0], weight, power, guide, patches)

    return make


def kept(config: Config) -> list[Path]:
    return sorted((config.output / "calibration").glob("*"))


def no_patches():
    raise AssertionError("the data set was asked for")


def test_what_was_measured_is_kept_and_needs_no_patches(meter, config):
    first, second = meter(), meter(patches=no_patches)
    conditions = first.conditions(SETTINGS)
    torch.testing.assert_close(conditions, LEVELS ** (1 / 4), rtol=0, atol=0.1)
    (file,) = kept(config)
    assert json.loads(file.read_text())["made_with"]["guides"][0] == "guide_rgb@9:2.0"
    assert torch.equal(second.conditions(SETTINGS), conditions)
    # One measurement serves every way of using it.
    for change in ({"calibrate": "distance"}, {"calibrate": "none", "spacing": "adaptive"}, {"batch_size": 1}):
        settings = SETTINGS.model_copy(update=change)
        assert torch.equal(second.conditions(settings), first.conditions(settings))
        assert second.adaptive(settings) == first.adaptive(settings)
    assert (len(first.made), len(second.made)) == (1, 0)
    assert kept(config) == [file]


@pytest.mark.parametrize(
    ("other", "change"),
    [
        ({"weight": 1.5}, {}),
        ({"power": 3.0}, {}),
        ({"guide": "guide_rgb@10"}, {}),
        ({"seed": 1}, {}),
        ({}, {"source": "B", "target": "A"}),
        ({}, {"solver": "euler"}),
        ({}, {"steps": 7}),
        ({}, {"guidance_scale": 2.0}),
    ],
)
def test_another_network_guide_or_setting_is_measured_anew(meter, config, other, change):
    """Weights tell a network or guide that was trained again from one of as many steps."""
    meter().conditions(SETTINGS)
    again = meter(**other)
    again.conditions(SETTINGS.model_copy(update=change))
    assert len(again.made) == 1
    assert len(kept(config)) == 2


def test_guides_of_one_name_in_two_folders_are_two(meter):
    one, powers = meter(), {Path("a/guide_rgb"): 2.0, Path("b/guide_rgb"): 4.0}
    one.guides.load = lambda guidance, *, sees: [Guide(powers[guidance.guides[0]])]
    one.guides.named = lambda guidance, *, sees: [f"guide_rgb@9:{powers[guidance.guides[0]]}"]
    both = [SETTINGS.model_copy(update={"guidance": GuidanceConfig(guides=[path])}) for path in powers]
    assert not torch.equal(*(one.conditions(settings) for settings in both))


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_made_anew(meter, config, damage):
    before = meter().conditions(SETTINGS)
    (file,) = kept(config)
    whole = file.read_text()
    file.write_text(whole[:-20] if damage == "cut" else whole.replace('"steps": 25', '"steps": 24'))
    again = meter()
    assert torch.equal(again.conditions(SETTINGS), before)
    assert len(again.made) == 1
    assert file.read_text() == whole


@pytest.mark.parametrize("folder", ["cannot be written", "is not there"])
def test_without_a_folder_it_is_measured_once_in_memory(meter, config, folder):
    if folder == "is not there":
        config.output.rmdir()
    else:
        (config.output / "calibration").write_text("a file where the folder should be")
    processes = Processes(1)
    one = meter(fabric=processes[0])
    assert torch.equal(one.conditions(SETTINGS), one.conditions(SETTINGS))
    assert len(one.made) == 1
    said = [line for line in processes.printed if not line.startswith("calibrating levels: ")]
    assert len(said) == (folder == "cannot be written")
    assert config.output.exists() == (folder == "cannot be written")


def in_two_processes(function) -> list:
    """What function(rank, fabric) returns, in both."""
    processes = Processes(2)
    with ThreadPoolExecutor(2) as threads:
        return [future.result() for future in [threads.submit(function, r, processes[r]) for r in range(2)]]


def test_one_process_measures_for_all(meter, config):
    """Also where nothing can be kept: the others receive it, they do not read."""
    config.output.rmdir()

    def work(rank, fabric):
        one = meter(fabric=fabric, patches=Patches if rank == 0 else no_patches)
        one.method(**SETTINGS.of("progression")).prepare(None, one.of(SETTINGS))
        return one.conditions(SETTINGS), len(one.made)

    (first, made), (second, made_by_other) = in_two_processes(work)
    assert torch.equal(first, second)
    assert (made, made_by_other) == (1, 0)


def test_nothing_is_measured_where_nothing_needs_it(meter):
    off = SETTINGS.model_copy(update={"calibrate": "none"})
    assert torch.equal(meter(patches=no_patches).conditions(off), LEVELS)
    for change in ({"calibrate": "none"}, {"calibrate_each": True}):
        Progression(**{**SETTINGS.of("progression"), **change}).prepare(None, None)


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt])
def test_what_one_process_cannot_do_is_told_by_all(error):
    def work(rank, fabric):
        def fail():
            raise error("no such thing")

        is_told_alike = rank == 0 or error is UserError
        with pytest.raises(error if is_told_alike else RuntimeError, match="no such thing"):
            from_rank_zero(fabric, fail)
        return from_rank_zero(fabric, lambda: rank)

    assert in_two_processes(work) == [0, 0]

"""The refiner: its flow in closed form, what it learns from, and what it does to a run's frames."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from cellflux_bridge import Bridge, checkpoint, cli, images
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import Condition
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.refiner import model
from cellflux_bridge.refiner.model import FINEST, build_refiner, noise_in, noise_levels, refine
from cellflux_bridge.refiner.task import RefinerTask

SCALE = 0.2
REFINER = {"scale": SCALE, "velocity": {"channels": 8}, "train": {"steps": 4, "batch_size": 8}}


class Grain(nn.Module):
    """E[eps | x] for patches whose pixels are normal around 0 with standard deviation `spread`."""

    def __init__(self, spread: float):
        super().__init__()
        self.spread = spread

    def forward(self, t, x, cond):
        sigma = (FINEST * (SCALE / FINEST) ** t)[:, None, None, None]
        return sigma * x / (self.spread**2 + sigma**2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [0.03, 0.1, 0.4])
def test_grain_of_the_right_strength_comes_back(spread):
    # The flow of a normal distribution is linear: x(sigma) is proportional to sqrt(spread^2 + sigma^2).
    flat = torch.full((4, 3, 32, 32), 127, dtype=torch.uint8)
    refined = refine(Grain(spread), flat, noise(4, 3, 32, 32), sigma=SCALE, scale=SCALE)
    made = images.encode(refined) - images.encode(flat)
    expected = SCALE * spread / (spread**2 + SCALE**2) ** 0.5
    rounding = 1 / 127.5 / 12**0.5
    assert made.std().item() == pytest.approx((expected**2 + rounding**2) ** 0.5, rel=0.03)
    assert torch.corrcoef(torch.stack([made.flatten(), noise(4, 3, 32, 32).flatten()]))[0, 1] > 0.95


def test_more_noise_takes_more_steps():
    for scale, num in ((0.005, 1), (0.2, 3), (0.6, 5)):
        found = noise_levels(scale)
        assert (found[0], found[-1]) == pytest.approx((scale, FINEST))
        assert len(found) - 1 == num
        assert np.ptp(np.diff(np.cbrt(found))) < 1e-9  # even in the cube root


def test_patches_without_grain_come_back_as_they_were():
    class Clean(nn.Module):
        def forward(self, t, x, cond):
            return (x - image) / (FINEST * (SCALE / FINEST) ** t)[:, None, None, None]

    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = images.encode(frames)
    found = refine(Clean(), frames, noise(2, 3, 8, 8), sigma=SCALE, scale=SCALE)
    assert (found.int() - frames.int()).abs().max() <= 2  # FINEST is left, half a grey level


def test_the_networks_time_is_the_logarithm_of_the_noise():
    seen = []

    class Noted(nn.Module):
        def forward(self, t, x, cond):
            seen.append(t)
            return x

    sigma = torch.tensor([FINEST, (FINEST * SCALE) ** 0.5, SCALE])
    noise_in(Noted(), torch.zeros(3, 1, 2, 2), sigma, scale=SCALE)
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 0.5, 1.0]))


def test_a_condition_without_parts_has_a_length():
    assert len(Condition(dropped=torch.ones(5, dtype=torch.bool)).null()) == 5


@pytest.fixture
def file(tmp_path, patch_folder, write_config):
    return write_config(tmp_path, refiner=REFINER, data={"image_size": 16})


def task_of(file, *overrides: str) -> RefinerTask:
    config = load_config(file, overrides)
    patches = load_patches(config.data, seed=config.seed)
    data = config.data.model_copy(update={"classes": list(patches.classes)})
    return RefinerTask(config.model_copy(update={"data": data}), patches)


def test_a_batch_covers_all_strengths_of_noise_evenly_and_is_of_training_patches(file, monkeypatch):
    chosen, random = [], Patches.random
    monkeypatch.setattr(Patches, "random", lambda self, of, **how: chosen.extend(of) or random(self, of, **how))
    task = task_of(file, "data.split.val=0.2", "data.split.test=0.2", "refiner.window=8")
    drawn = [task.batch(index, rank=0) for index in range(40)]
    share = torch.cat([(of.sigma / FINEST).log() / np.log(SCALE / FINEST) for of in drawn])
    assert ((share.view(40, 8).sort(1).values * 8).floor() == torch.arange(8)).all()  # one of each eighth in each batch
    assert abs(torch.cat([of.noise for of in drawn]).std() - 1) < 0.02
    assert set(chosen) == set(task._patches.indices("train"))
    assert drawn[0].x.shape == (8, 3, 8, 8)
    again, other = task.batch(0, rank=0), task.batch(0, rank=1)
    assert all(map(torch.equal, again, drawn[0]))
    assert not torch.equal(other.noise, drawn[0].noise)


def test_the_loss_is_that_of_the_noise(file):
    task, batch = task_of(file), task_of(file).batch(0, rank=0)

    class Told(nn.Module):
        def forward(self, t, x, cond):
            return (x - images.encode(batch.x)) / batch.sigma[:, None, None, None]

    assert task.loss(Told(), batch).item() < 1e-8
    assert task.loss(build_refiner(task._config), batch).item() == pytest.approx(1, abs=0.1)  # it begins with zeros


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("refiner.scale=0.003", "refiner.scale"),
        ("refiner.window=7", "refiner.window"),
        ("refiner.scale=2", "refiner.scale: "),
        ("refiner.train.devices=2", "refiner.train.devices: .*set train.devices"),
        ("refiner.train.init_from=runs/x", "refiner.train.init_from: "),
        ("refiner.velocity.predict=endpoint", "predict: velocity"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(file, override, key):
    with pytest.raises(UserError, match=key):
        task_of(file, override)


# In a run

BY_LEVEL = ("condition.target=level", "condition.source_image=true", "condition.source_class=false")
MANY = ("translate.method=progression", "translate.levels=3", "translate.steps=1", "translate.num=4")


@pytest.fixture
def run(file, tmp_path):
    cli.main(["train", str(file), *BY_LEVEL])
    return tmp_path / "runs" / "tiny"


def frames(run, *overrides: str) -> np.ndarray:
    bridge = Bridge.load(run, [*MANY, *overrides])
    patches = bridge.patches()
    chosen = patches.sample("test", "A", num=3, seed=0)
    return bridge.translate(patches.centre(chosen), ids=[patches.ids[i] for i in chosen]).frames


def test_all_frames_but_the_source_are_refined_whatever_the_batch(run, monkeypatch):
    calls, sigmas = [], []

    def noted(network, x, noise, *, sigma, scale):
        calls.append(noise)
        sigmas.append(sigma)
        assert scale == SCALE
        return 255 - x

    plain = frames(run, "translate.refine=false")
    refined = frames(run)
    assert (refined[0] == plain[0]).all()
    assert (refined[1:] != plain[1:]).any((1, 2, 3, 4)).all()
    assert (frames(run, "translate.batch_size=2") == refined).all()
    monkeypatch.setattr(model, "refine", noted)
    assert (frames(run)[1:] == 255 - plain[1:]).all()
    variances = SCALE**2 * np.array([1, 2, 3]) / 3  # they rise evenly with the level
    np.testing.assert_allclose(np.square(sigmas), variances, rtol=1e-5)
    of_levels = torch.cat(calls).unflatten(0, (3, 3))
    assert torch.equal(of_levels, of_levels[:1].expand_as(of_levels))  # the same along a sequence
    assert not torch.equal(of_levels[0, 0], of_levels[0, 1])


def test_what_made_frames_is_in_their_header(run):
    bridge = Bridge.load(run, MANY)
    header = bridge._header(bridge._settings(None, None, {}))
    cost = bridge.translate(bridge.patches().centre([0])).nfe
    plain = Bridge.load(run, [*MANY, "translate.refine=false"])
    assert "+refiner@4:" in header.config_hash
    assert "refiner" not in plain._header(plain._settings(None, None, {})).config_hash
    assert cost[0] == plain.translate(plain.patches().centre([0])).nfe[0] + 3 * 6
    assert [bridge._refiner.forwards(level) for level in (0, 0.01, 1)] == [0, 2, 6]


def test_a_run_gets_a_refiner_later_and_keeps_its_flow(file, tmp_path):
    cli.main(["train", str(file), *BY_LEVEL, "refiner.scale=0"])
    run = tmp_path / "runs" / "tiny"
    assert not (run / "refiner").exists()
    before = (checkpoint.latest(run) / checkpoint.WEIGHTS).stat()
    for keys, options in (["refiner.scale=0.2"], {}), ([], {"refine": True}):
        bridge = Bridge.load(run, keys)
        with pytest.raises(UserError, match=r"has no trained refiner. Train it: .* refiner.scale=0.2"):
            bridge.translate(bridge.patches().centre([0]), **options)
    unrefined = frames(run)
    cli.main(["train", str(run), "refiner.scale=0.2"])
    assert (checkpoint.latest(run) / checkpoint.WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns
    assert (frames(run)[1:] != unrefined[1:]).any()
    assert (frames(run, "translate.refine=false") == unrefined).all()
    with pytest.raises(SystemExit, match=r"refiner.scale \(0.2 there, 0.1 here\)"):
        cli.main(["train", str(run), "refiner.scale=0.1"])


def test_no_other_training_of_a_run_minds_a_refiner(file, tmp_path):
    levels = [*BY_LEVEL, "condition.level=crossfit", "classifier.folds=2", "classifier.train.steps=2"]
    run, split = tmp_path / "runs" / "tiny", ("data.split.val=0.2", "data.split.test=0.2")
    cli.main(["train", str(file), *levels, *split, "refiner.scale=0"])
    cli.main(["train-classifier", str(run), "classifier.role=guide"])
    cli.main(["train", str(run), "refiner.scale=0.2"])
    cli.main(["train-classifier", str(run), "classifier.role=guide"])
    assert (run / "refiner" / "checkpoints").exists()


def test_a_run_is_known_by_its_refiner(run):
    refined, plain = (Bridge.load(run, [*MANY, *keys]).identity() for keys in ((), ["translate.refine=false"]))
    assert "+refiner@4:" in refined
    assert "refiner" not in plain


def test_a_refiner_of_another_configuration_is_refused(run):
    files = checkpoint.latest(run / "refiner") / "config.yaml", run / "config.yaml"
    before = files[0].read_text()
    for section, key, value in (("refiner", "scale", 0.5), ("refiner", "window", 8), ("data", "channels", 1)):
        changed = yaml.safe_load(before)
        changed[section][key] = value
        files[0].write_text(yaml.safe_dump(changed))
        with pytest.raises(UserError, match=f"trained otherwise and cannot be used with {section}.{key} "):
            Bridge.load(run, MANY)
    for file in files:  # as a received run may say in both
        file.write_text(file.read_text().replace("channels: 1", "channels: 3").replace("scale: 0.2", "scale: 1e-300"))
    with pytest.raises(UserError, match=r"refiner.scale=1e-300: expected more than"):
        Bridge.load(run, MANY)


def test_values_that_are_not_finite_are_no_frame():
    class Broken(nn.Module):
        def forward(self, t, x, cond):
            return x / 0

    with pytest.raises(UserError, match="not finite"):
        refine(Broken(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), noise(1, 3, 8, 8), sigma=SCALE, scale=SCALE)

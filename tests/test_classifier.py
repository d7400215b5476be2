"""Patch classifiers: what they look at, when they jitter, and that they learn."""

import numpy as np
import pytest
import torch

from cellflux_bridge.classifier.model import PatchClassifier, grey_view
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.errors import UserError
from cellflux_bridge.metrics.flip import flip_rate
from cellflux_bridge.training import checkpoint, classifier
from cellflux_bridge.training.classifier import ClassifierTask, colour_statistics, predict
from cellflux_bridge.training.loop import fit, make_fabric
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, linear_soft_labels

CPU = torch.device("cpu")


def images(num: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


def test_the_grey_view_is_blind_to_brightness_contrast_and_tint():
    x = images()
    expected = grey_view(x)
    assert expected.shape == (4, 1, 16, 16)
    torch.testing.assert_close(expected.mean((2, 3)), torch.zeros(4, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.std((2, 3)), torch.ones(4, 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(grey_view(0.4 * x - 0.3), expected, rtol=0, atol=1e-4)
    tint = torch.tensor([0.3, -0.1, -0.2]).view(3, 1, 1)
    torch.testing.assert_close(grey_view(x + tint), expected, rtol=0, atol=1e-4)
    # A hue turned about the luminance axis: red against green and blue, their weighted sum unchanged.
    turned = x + x.roll(1, 3)[:, :1] * torch.tensor([0.587, -0.299, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(grey_view(turned), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(grey_view(x.flip(3)), expected, atol=0.1)


def test_the_grey_view_does_not_blow_up_an_empty_patch():
    flat = grey_view(torch.full((1, 3, 8, 8), 0.7) + 1e-4 * images(1, 8))
    assert flat.abs().max() < 0.05


@pytest.mark.parametrize("view", ["rgb", "grey"])
def test_the_view_decides_what_recolouring_can_do(view):
    torch.manual_seed(0)
    model, x = PatchClassifier(3, view=view).eval(), images()
    recoloured = 0.5 * x + torch.tensor([0.2, 0.1, 0.3]).view(3, 1, 1)
    assert model(x).shape == (4, 3)
    assert torch.allclose(model(x), model(recoloured), atol=1e-3) == (view == "grey")


@pytest.mark.parametrize("options", [{"jitter": 0.5}, {"blur": 2.0}])
@pytest.mark.parametrize("view", ["rgb", "grey"])
def test_jitter_and_blur_belong_to_training(options, view):
    class Shown(torch.nn.Module):
        def forward(self, x):
            return x

    model, x = PatchClassifier(2, view=view, **options), images(16)
    model.net = Shown()
    plain = PatchClassifier(2, view=view)
    plain.net = Shown()
    assert torch.equal(model.eval()(x), plain.train()(x))
    torch.manual_seed(0)
    first = model.train()(x)
    assert first.shape == plain(x).shape
    changed = (first - plain(x)).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert changed.sum() >= 12  # a small sigma leaves an image as it is
    torch.manual_seed(0)
    assert torch.equal(model(x), first)


def test_blur_smooths_and_keeps_the_mean():
    class Shown(torch.nn.Module):
        def forward(self, x):
            return x

    torch.manual_seed(0)
    model, x = PatchClassifier(2, blur=2.0).train(), images(16, 32)
    model.net = Shown()
    blurred = model(x)
    torch.testing.assert_close(blurred.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=0.03)
    assert (blurred.std((2, 3)) <= x.std((2, 3)) + 1e-5).all()
    assert blurred.std() < 0.7 * x.std()
    flat = torch.full((2, 3, 32, 32), 0.3)
    torch.testing.assert_close(model(flat), flat)


def test_a_timm_model_by_its_name():
    model = PatchClassifier(2, backbone="test_resnet", view="grey").eval()
    assert model(images(2, 32)).shape == (2, 2)
    assert type(model.net).__module__.startswith("timm")


def test_an_unknown_backbone_is_refused_by_name():
    with pytest.raises(UserError, match=r"classifier\.backbone: .*resnet_of_nowhere.*expected 'small' or a timm model"):
        PatchClassifier(2, backbone="resnet_of_nowhere")


@pytest.fixture
def judged(patch_folder, tmp_path, write_config):
    """A function that trains a classifier on the two-coloured patches and returns it with its patches and scores."""

    def judge(**options):
        section = {**options, "train": {"steps": 25, "batch_size": 16, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5}}
        file = write_config(tmp_path, classifier=section, data={"split": {"val": 0.2, "test": 0.3}})
        config = load_config(file, ["data.classes=[A, B]", "classifier.train.accelerator=cpu"])
        patches = load_patches(config.data, seed=config.seed)
        (tmp_path / "judge").mkdir()
        train = config.classifier.train
        torch.manual_seed(0)
        newest = fit(
            ClassifierTask(config, patches), config, train, folder=tmp_path / "judge", fabric=make_fabric(train)
        )
        model = classifier.load(newest, CPU)
        return model, patches, classifier.test_scores(model, patches, device=CPU), newest

    return judge


def test_colours_that_differ_are_learned_and_the_colour_baseline_says_so(judged):
    model, patches, scores, newest = judged()
    assert scores["test/n"] == len(patches.indices("test")) > 8
    assert scores["test/accuracy"] == scores["test/balanced_accuracy"] == 1
    assert scores["test/colour_only_balanced_accuracy"] == 1
    assert checkpoint.step_of(newest) == 25

    real = patches.centre(patches.indices("train", "B")).permute(0, 2, 3, 1).numpy()
    header = TrajectoryHeader("path", "A", "B", ("A", "B"), (0.0, 0.5, 1.0), "x")
    a, b = (patches.centre(patches.indices("test", label)[:3]).numpy() for label in "AB")
    frames = np.stack([a, a, b])
    batch = Trajectory(header, frames, linear_soft_labels(header, 3), ("0", "1", "2"), (4, 4, 4))
    rate = flip_rate(
        [batch, batch],
        lambda part: predict(model, part, device=CPU),
        classes=("A", "B"),
        real_targets=real,
    )
    assert rate.levels == (0.0, 0.5, 1.0)
    assert rate.fraction == (0.0, 0.0, 1.0)
    assert rate.probability[0] < 0.5 < rate.probability[2]
    assert rate.reinhard == 1.0  # what differs is colour, so a colour transfer fools this judge
    assert rate.num_sequences == 6
    with pytest.raises(UserError, match="no whole sequence"):
        flip_rate([], lambda part: predict(model, part, device=CPU), classes=("A", "B"), real_targets=real)


def test_a_trained_classifier_does_not_depend_on_the_batch(judged):
    model, patches, *_ = judged(view="grey", jitter=0.2, blur=0.5)
    x = patches.centre(patches.indices("test"))
    together = predict(model, x, device=CPU)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(predict(model, x[3:4], device=CPU), together[3:4], atol=1e-5)
    np.testing.assert_allclose(predict(model, x, device=CPU, chunk=2), together, atol=1e-5)


def test_batches_are_balanced_and_depend_on_their_number_alone(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches", num={"A": 12, "B": 60})
    config = load_config(write_config(tmp_path), ["data.classes=[A, B]", "classifier.train.batch_size=64"])
    task = ClassifierTask(config, load_patches(config.data, seed=0))
    y = torch.cat([task.batch(i, rank=0).y for i in range(10)])
    assert y.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(task.batch(4, rank=0).x, task.batch(4, rank=0).x)
    assert not torch.equal(task.batch(4, rank=0).x, task.batch(4, rank=1).x)
    brightness = task.batch(0, rank=0)
    means = [brightness.x[brightness.y == c].mean().item() for c in (0, 1)]
    assert means[0] > means[1] + 0.2  # labels belong to their patches: A is the pale class


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_split_is_refused_before_training(patch_folder, tmp_path, write_config, split):
    file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.2, split: 0.0}})
    config = load_config(file, ["data.classes=[A, B]"])
    with pytest.raises(UserError, match=f"the {split} split is empty"):
        ClassifierTask(config, load_patches(config.data, seed=0))


def test_colour_statistics_are_means_and_spreads():
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    batch[0, 0] = 10
    batch[0, 1] = torch.tensor([[0, 2], [4, 6]])
    np.testing.assert_allclose(colour_statistics(batch), [[10, 3, 0, 0, np.std([0, 2, 4, 6], ddof=1), 0]], rtol=1e-6)

"""Patch classifiers: what they look at, when they jitter, and that they learn."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch.utils.flop_counter import FlopCounterMode

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier import scores as classifier_scores
from cellflux_bridge.classifier.calibration import fit_temperature
from cellflux_bridge.classifier.inference import predict
from cellflux_bridge.classifier.model import TIME_BINS, PatchClassifier, grey_view
from cellflux_bridge.classifier.scores import colour_statistics
from cellflux_bridge.classifier.states import States
from cellflux_bridge.classifier.task import ClassifierTask
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import Patches, load_patches
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.metrics.classify import flip_rate
from cellflux_bridge.metrics.loading import load_networks
from cellflux_bridge.training.loop import fit, make_fabric
from cellflux_bridge.trajectory import Trajectory, TrajectoryHeader, TrajectoryWriter, linear_soft_labels

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
    with pytest.raises(
        UserError, match=r"classifier\.backbone: .*resnet_of_nowhere.*expected small, fast or a timm model"
    ):
        PatchClassifier(2, backbone="resnet_of_nowhere")


@pytest.fixture(scope="module")
def judge(tmp_path_factory, make_patches, write_config):
    """A function that trains a classifier on the two-coloured patches and returns it with its patches and scores."""

    def judge(steps=25, **options):
        folder = tmp_path_factory.mktemp("judge")
        make_patches(folder / "patches")
        train = {"steps": steps, "batch_size": 16, "lr": 3e-3, "warmup_steps": 0, "ema_decay": 0.5}
        section = {**options, "train": train}
        file = write_config(folder, classifier=section, data={"split": {"val": 0.2, "test": 0.3}})
        config = load_config(file, ["data.classes=[A, B]", "classifier.train.accelerator=cpu"])
        patches, train = load_patches(config.data, seed=config.seed), config.classifier.train
        torch.manual_seed(0)
        newest = fit(ClassifierTask(config, patches), config, train, folder=folder, fabric=make_fabric(train))
        model = inference.load(newest, CPU)
        return model, patches, classifier_scores.image_scores(model, patches, device=CPU), newest

    return judge


@pytest.fixture(scope="module")
def judged(judge):
    return judge()


def test_colours_that_differ_are_learned_and_the_colour_baseline_says_so(judged):
    model, patches, scores, newest = judged
    assert scores["test/n"] == len(patches.indices("test")) > 8
    assert scores["test/accuracy"] == scores["test/balanced_accuracy"] == 1
    assert scores["test/colour_only_balanced_accuracy"] == scores["test/colour_only_auc"] == scores["test/auc"] == 1
    assert scores["test/ece"] < 0.3
    assert scores["test/temperature"] == pytest.approx(model.temperature.item()) != 1
    assert checkpoint.step_of(newest) == 25


def test_a_judge_of_colour_calls_a_colour_transfer_the_target(judged, tmp_path):
    _, patches, _, newest = judged
    header = TrajectoryHeader("path", "A", "B", ("A", "B"), (0.0, 0.5, 1.0), "x")
    a, b = (patches.centre(patches.indices("test", label)[:3]).numpy() for label in "AB")
    writer = TrajectoryWriter(tmp_path / "t", header)
    (network,) = load_networks([("judge", newest)], source="A", target="B", device=CPU)
    with pytest.raises(UserError, match=r"t: no whole sequence"):
        flip_rate(tmp_path / "t", network, seed=0)
    frames, ids = np.stack([a, a, b]), ("0", "1", "2")
    writer.append(Trajectory(header, frames, linear_soft_labels(header, 3), ids, (4,) * 3, (0,) * 3), numbers=range(3))
    writer.finish()
    rate = flip_rate(tmp_path / "t", network, seed=0)
    assert rate["levels"] == (0.0, 0.5, 1.0)
    assert rate["fraction"] == [0.0, 0.0, 1.0]
    assert rate["probability"][0] < 0.5 < rate["probability"][2]
    assert rate["reinhard"] == 1.0  # what differs is colour
    assert rate["num_sequences"] == 3


def test_a_trained_classifier_does_not_depend_on_the_batch(judged):
    model, patches, *_ = judged
    x = patches.centre(patches.indices("test"))
    together = predict(model, x, device=CPU)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(predict(model, x[3:4], device=CPU), together[3:4], atol=1e-5)
    np.testing.assert_allclose(predict(model, x, device=CPU, chunk=2), together, atol=1e-5)


def test_batches_are_balanced_and_depend_on_their_number_alone(tmp_path, make_patches, write_config):
    make_patches(tmp_path / "patches", num={"A": 12, "B": 60})
    config = load_config(write_config(tmp_path), ["data.classes=[A, B]", "classifier.train.batch_size=64"])
    task = ClassifierTask(config, load_patches(config.data, seed=0))
    y = torch.cat([task.batch(i, rank=0).y for i in range(10)])[:, 1]
    assert y.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(task.batch(4, rank=0).x, task.batch(4, rank=0).x)
    assert not torch.equal(task.batch(4, rank=0).x, task.batch(4, rank=1).x)
    brightness = task.batch(0, rank=0)
    means = [brightness.x[brightness.y[:, 1] == c].mean().item() for c in (0, 1)]
    assert means[0] > means[1] + 0.2  # labels belong to their patches: A is the pale class


@pytest.mark.parametrize("mixup", [0, 1])
def test_a_large_validation_split_is_seen_by_a_balanced_sample(
    tmp_path, make_patches, write_config, monkeypatch, mixup
):
    make_patches(tmp_path / "patches", num={"A": 30, "B": 150})
    file = write_config(tmp_path, data={"split": {"val": 0.4, "test": 0.1}}, classifier={"mixup": mixup})
    config = load_config(file, ["data.classes=[A, B]", "classifier.train.validate_pairs=20"])
    patches = load_patches(config.data, seed=0)
    assert np.bincount(patches.labels[patches.indices("val")]).tolist() == [12, 60]
    seen = []
    monkeypatch.setattr(Patches, "centre", lambda self, rows, see=Patches.centre: seen.append(rows) or see(self, rows))

    def validated() -> np.ndarray:
        seen.clear()
        task = ClassifierTask(config, patches)
        figures = [task.validate(task.model.eval(), CPU) for _ in range(2)]
        assert figures[0] == figures[1]
        return np.concatenate([np.ravel(rows) for rows in seen[: len(seen) // 2]])

    if not mixup:
        np.testing.assert_array_equal(validated(), patches.indices("val"))
    monkeypatch.setattr("cellflux_bridge.classifier.task._ENOUGH_TO_VALIDATE", 8)  # validate_pairs are more
    sample = validated()
    assert set(sample) <= set(patches.indices("val"))
    if mixup:
        assert len(sample) == 2 * 20
    else:
        assert np.bincount(patches.labels[sample]).tolist() == [10, 10]


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_split_is_refused_before_training(patch_folder, tmp_path, write_config, split):
    file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.2, split: 0.0}})
    config = load_config(file, ["data.classes=[A, B]"])
    with pytest.raises(UserError, match=f"the {split} split is empty"):
        ClassifierTask(config, load_patches(config.data, seed=0))


def test_the_colour_baseline_weights_rare_classes_as_the_classifier_does():
    """Of 2,000 patches 5 % are of class B, darker by two of their standard deviations: half-way between, 84 % of either
    class are told. Unweighted, a regression calls nearly all of them A."""
    rng = np.random.default_rng(0)
    labels = (np.arange(2000) % 20 == 0).astype(int)
    grey = rng.normal(150 - 20 * labels, 10)[:, None, None, None].round().clip(0, 255).astype(np.uint8)
    patches = Patches(
        pixels=np.broadcast_to(grey, (2000, 16, 16, 3)),
        ids=tuple(map(str, range(2000))),
        labels=labels,
        splits=np.arange(2000) // 1000 * 2,
        groups=np.arange(2000),
        group_names=tuple(map(str, range(2000))),
        scores=np.full(2000, np.nan, np.float32),
        classes=("A", "B"),
        preprocessing=Preprocessing(16),
        batches=np.full(2000, -1),
        batch_names=(),
        doses=np.zeros(2000, np.float32),
    )
    scores = classifier_scores.image_scores(PatchClassifier(2), patches, device=CPU)
    assert scores["test/colour_only_balanced_accuracy"] == pytest.approx(norm.cdf(1), abs=0.06)


def test_colour_statistics_are_means_and_spreads():
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    batch[0, 0] = 10
    batch[0, 1] = torch.tensor([[0, 2], [4, 6]])
    np.testing.assert_allclose(colour_statistics(batch), [[10, 3, 0, 0, np.std([0, 2, 4, 6], ddof=1), 0]], rtol=1e-6)


# Log-probabilities, features and states


def state_classifier(**options) -> PatchClassifier:
    torch.manual_seed(0)
    model = PatchClassifier(3, sees="state", **options).eval()
    model.temperature.copy_(torch.linspace(0.5, 2, TIME_BINS))
    return model


@pytest.mark.parametrize("backbone", ["small", "test_resnet"])
def test_features_are_what_the_last_layer_sees(backbone):
    torch.manual_seed(0)
    model, x = PatchClassifier(3, backbone=backbone).eval(), images(4, 32)
    head = model.net.head if backbone == "small" else model.net.get_classifier()
    found = model.features(x)
    assert found.ndim == 2
    torch.testing.assert_close(head(found), model(x))
    batch = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    in_chunks = inference.features(model, batch, device=CPU, chunk=2)
    assert in_chunks.dtype == np.float32
    np.testing.assert_allclose(in_chunks, inference.features(model, batch, device=CPU), atol=1e-5)
    np.testing.assert_allclose(in_chunks, model.features(batch / 127.5 - 1).detach(), atol=1e-5)


def test_the_temperature_divides_logits_and_probabilities_alone():
    torch.manual_seed(0)
    model, x = PatchClassifier(3).eval(), images()
    logits = model(x)
    model.temperature.fill_(2.5)
    assert torch.equal(model(x), logits)
    torch.testing.assert_close(model.log_probabilities(x), (logits / 2.5).log_softmax(1))
    batch = ((x + 1) * 127.5).round().to(torch.uint8)
    expected = model.log_probabilities(batch / 127.5 - 1).exp().detach()
    np.testing.assert_allclose(predict(model, batch, device=CPU), expected, atol=1e-6)


def test_time_enters_and_has_its_own_temperature():
    model, x = state_classifier(), images()
    t = torch.tensor([0.0, 0.19, 0.5, 1.0])
    logits = model(x, t)
    assert not torch.allclose(logits, model(x, t + 0.1), atol=1e-4)
    own = model.temperature[[0, 0, 2, TIME_BINS - 1], None]
    torch.testing.assert_close(model.log_probabilities(x, t), (logits / own).log_softmax(1))
    for i in range(4):  # no sample depends on its batch
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1])[0], logits[i], rtol=0, atol=1e-5)


def test_the_clean_source_is_seen_where_it_is_given():
    model, x, t = state_classifier(source_image=True), images(), torch.full((4,), 0.5)
    x0 = images().roll(1, 0)
    assert not torch.allclose(model(x, t, x0), model(x, t, x), atol=1e-4)
    with pytest.raises(AssertionError, match="clean source"):
        model(x, t)
    with pytest.raises(AssertionError, match="time"):
        state_classifier()(x)


@pytest.mark.parametrize("sees", ["image", "grey", "state"])
def test_gradients_of_log_probabilities_are_those_of_finite_differences(sees):
    torch.manual_seed(0)
    options = (
        {"sees": "state", "source_image": True} if sees == "state" else {"view": "grey" if sees == "grey" else "rgb"}
    )
    model = PatchClassifier(2, **options).double().eval()
    model.temperature.fill_(1.7)
    x, x0 = images(2).double(), images(2).double().flip(0)
    rest = (torch.tensor([0.3, 0.8], dtype=torch.float64), x0) if sees == "state" else ()
    q = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)

    def wanted(at):
        return (q * model.log_probabilities(at, *rest)).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(wanted(x), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (wanted(x + 1e-6 * direction) - wanted(x - 1e-6 * direction)) / 2e-6
    assert gradient.abs().sum() > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def test_pretrained_models_get_the_colours_that_they_know(monkeypatch):
    known = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.5)}
    monkeypatch.setattr("timm.data.resolve_model_data_config", lambda net: known)
    model, x = PatchClassifier(2, backbone="test_resnet", pretrained=True, download=False), images(2, 32)
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model._input(x, None, None), ((x + 1) / 2 - mean) / std)
    plain = PatchClassifier(2, backbone="test_resnet")
    assert torch.equal(plain._input(x, None, None), x)
    # A checkpoint needs no download, and carries the normalisation.
    assert model.state_dict().keys() - plain.state_dict().keys() == {"mean", "std"}


@pytest.fixture
def configured(patch_folder, tmp_path, write_config):
    """`configured(*overrides) -> (config, patches)` of the two-coloured patches."""

    def make(*overrides: str):
        file = write_config(tmp_path, data={"split": {"val": 0.2, "test": 0.3}}, pairs={"identity": True})
        options = ["classifier.train.batch_size=8", "classifier.train.validate_pairs=8", "classifier.train.steps=6"]
        cpu = ["classifier.train.accelerator=cpu", "data.classes=[A, B]"]
        config = load_config(file, [*options, *cpu, *overrides])
        return config, load_patches(config.data, seed=config.seed)

    return make


STATE = ("classifier.role=guide", "classifier.sees=state")


def test_states_are_the_paths_and_labels_are_their_targets(configured):
    config, patches = configured(*STATE, "path=straight", "condition.source_image=true", "data.flips=false")
    task = ClassifierTask(config, patches)
    batch = task.batch(3, rank=0)
    assert 0 <= batch.t.min() < 0.2
    assert 0.8 < batch.t.max() <= 1
    # On the straight path x1 = (x_t - (1 - t) x0) / t, and A is the pale class.
    t = batch.t.view(-1, 1, 1, 1)
    x1 = ((batch.x - (1 - t) * batch.x0) / t)[batch.t > 0.1]
    values = (x1 + 1) * 127.5
    torch.testing.assert_close(values, values.round(), rtol=0, atol=2e-3)
    pale = x1.mean((1, 2, 3)) > batch.x0.mean()
    assert torch.equal(pale, batch.y[batch.t > 0.1][:, 0] == 1)
    again = ClassifierTask(config, patches).batch(3, rank=0)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch.x, task.batch(4, rank=0).x)
    other = configured(*STATE, "path=straight", "condition.source_image=true", "classifier.seed=1")[0]
    drawn = ClassifierTask(other, patches).batch(3, rank=0)
    assert not torch.equal(batch.x0, drawn.x0)
    assert not torch.equal(batch.t, drawn.t)
    without = ClassifierTask(configured(*STATE, "path=brownian")[0], patches).batch(0, rank=0)
    assert without.x0 is None
    assert without.t.min() >= 0.02


def test_states_stand_at_the_time_that_is_asked_for(configured):
    config, patches = configured(*STATE, "path=brownian", "path.margin=0.1")
    states = States(config, patches, np.eye(2, dtype=np.float32)[patches.labels], split="test")
    assert states.batch(0, time=0.5).t.unique().item() == pytest.approx(0.5)
    assert states.batch(0, time=0.0).t.unique().item() == pytest.approx(0.1)


def test_a_batch_of_states_that_the_patches_cannot_fill_is_refused_by_its_own_key(configured):
    config, patches = configured(*STATE, "path=brownian", "classifier.train.batch_size=640")
    with pytest.raises(UserError, match=r"classifier\.train\.batch_size=640 .*lower classifier\.train\.batch_size"):
        ClassifierTask(config, patches)


@pytest.mark.parametrize("options", [(), ("classifier.role=guide", "classifier.mixup=0.5")], ids=["judge", "mixed"])
def test_stain_is_jittered_in_training_and_nothing_else_is_drawn_anew(configured, options):
    config, patches = configured(*options)
    jittered, _ = configured(*options, "data.stain.mode=augment", "data.stain.strength=0.3")
    plain, task = ClassifierTask(config, patches), ClassifierTask(jittered, patches)
    before, after = plain.batch(3, rank=0), task.batch(3, rank=0)
    assert torch.equal(before.y, after.y)
    # The jitter moves every patch, each by a draw of its own, and leaves what it shows.
    moved = (after.x - before.x).mean((2, 3))
    assert (moved.abs().amax(1) > 1e-3).all()
    assert len(moved.unique(dim=0)) == len(moved)
    for one, other in zip(before.x, after.x, strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.95
    assert torch.equal(after.x, ClassifierTask(jittered, patches).batch(3, rank=0).x)
    # Validation sees patches as they are.
    model = plain.model.eval()
    assert plain.validate(model, CPU) == task.validate(model, CPU)


def test_mixup_mixes_patches_and_labels_by_one_share(configured):
    config, patches = configured("classifier.mixup=1", "data.flips=false")
    plain, mixed = (
        ClassifierTask(configured(f"classifier.mixup={alpha}", "data.flips=false")[0], patches).batch(2, rank=0)
        for alpha in (0, 1)
    )
    shares = []
    for x, y in zip(mixed.x, mixed.y, strict=True):
        fits = []
        for i, one in enumerate(plain.x):
            for j, other in enumerate(plain.x):
                way = one - other
                share = ((x - other) * way).sum() / (way * way).sum().clamp_min(1e-9)
                label = share * plain.y[i] + (1 - share) * plain.y[j]
                fits.append(((x - other - share * way).abs().max() + (label - y).abs().max(), share))
        worst, share = min(fits, key=lambda fit: fit[0])
        assert worst < 1e-4
        shares.append(share.item())
    assert min(shares) < 0.4  # not all are nearly unmixed
    assert torch.equal(ClassifierTask(config, patches).batch(2, rank=0).x, mixed.x)


def test_mixup_makes_the_probability_linear_between_the_classes(judge):
    model, patches, scores, _ = judge(steps=70, mixup=1.0)
    a, b = (patches.centre(patches.indices("test", label)[:4]).float() for label in "AB")
    shares = np.linspace(0, 1, 5)
    seen = [predict(model, torch.lerp(a, b, s).round().to(torch.uint8), device=CPU)[:, 1].mean() for s in shares]
    np.testing.assert_allclose(seen, shares, atol=0.2)  # .15, .15, .85, .85, .85 without mixup
    assert scores["test/balanced_accuracy"] == 1


def test_pairs_that_leave_nothing_to_tell_are_refused(configured):
    config, patches = configured(*STATE, "pairs.identity=false")
    with pytest.raises(UserError, match=r"A -> B, B -> A the source alone tells .*set pairs\.identity=true"):
        ClassifierTask(config, patches)
    ClassifierTask(configured(*STATE, "pairs.identity=false", "path=gaussian_source")[0], patches)
    one = configured(*STATE, "pairs.identity=false", "pairs.transitions=[[A, B]]", "path=gaussian_source")[0]
    with pytest.raises(UserError, match="A -> B the source alone tells"):
        ClassifierTask(one, patches)
    # Levels are drawn for every source alike.
    ClassifierTask(config, patches, levels=np.eye(2, dtype=np.float32)[patches.labels])


@pytest.mark.parametrize("wrong", ["classifier.role=judge", "classifier.view=grey", "classifier.mixup=1"])
def test_states_are_for_guides_that_see_colour_and_are_not_mixed(configured, wrong):
    with pytest.raises(UserError, match=r"classifier: .*sees=state"):
        configured(*STATE, wrong)


def test_guides_and_judges_are_separate_trainings(configured):
    config, patches = configured()
    judge, again = ClassifierTask(config, patches), ClassifierTask(config, patches)
    guide = ClassifierTask(configured("classifier.role=guide")[0], patches)
    fold = ClassifierTask(config, patches, train=patches.indices("train"), stream="fold 1")

    def first(task):
        return next(task.model.parameters())

    assert torch.equal(first(judge), first(again))
    assert torch.equal(judge.batch(0, rank=0).x, again.batch(0, rank=0).x)
    for other in (guide, fold):
        assert not torch.equal(first(judge), first(other))
        assert not torch.equal(judge.batch(0, rank=0).x, other.batch(0, rank=0).x)


@pytest.mark.parametrize("overrides", [(), STATE], ids=["image", "state"])
def test_a_resumed_classifier_repeats_an_uninterrupted_one_temperature_included(configured, tmp_path, overrides):
    config, patches = configured(*overrides)

    def run(folder: str, steps: int):
        (tmp_path / folder).mkdir(exist_ok=True)
        train = config.classifier.train.model_copy(update={"steps": steps})
        task = ClassifierTask(config, patches)
        return fit(task, config, train, folder=tmp_path / folder, fabric=make_fabric(train))

    whole, _, parts = run("whole", 6), run("parts", 3), run("parts", 6)
    weights, resumed = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
    assert weights["temperature"].numel() == (TIME_BINS if overrides else 1)
    assert (weights["temperature"] != 1).all()
    one, two = checkpoint.load_state(whole)["model"], checkpoint.load_state(parts)["model"]
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    model = inference.load(parts, CPU)
    assert torch.equal(model.temperature, weights["temperature"])
    if overrides:
        scores = classifier_scores.state_scores(model, config, patches, device=CPU)
        assert 0 <= scores["test/accuracy_at_t0.9"] <= 1
        test, levels = patches.indices("test"), np.eye(2, dtype=np.float32)[patches.labels]
        scores = classifier_scores.state_scores(model, config, patches, device=CPU, levels=levels)
        assert scores["test/n"] == len(test)
        levels[test[0]] = np.nan
        assert classifier_scores.state_scores(model, config, patches, device=CPU, levels=levels) == {"test/n": 0}
    else:  # on the validation split the temperature is the best one
        val = patches.indices("val")
        logits, targets = inference.patch_logits(model, patches, val, device=CPU), np.eye(2)[patches.labels[val]]
        best = fit_temperature(logits, targets, np.ones(len(val)))
        assert model.temperature.item() == pytest.approx(best, rel=1e-3)


def test_soft_labels_are_learned_and_their_error_told(patch_folder, configured):
    with open(patch_folder / "manifest.csv", "w", newline="") as file:
        rows = [(f"{c}/{c}{n:03d}.png", c, 0.2 if c == "A" else 0.7) for c in "AB" for n in range(24)]
        csv.writer(file).writerows([("path", "label", "score"), *rows])
    config, patches = configured("classifier.labels=score")
    task = ClassifierTask(config, patches)
    batch = task.batch(0, rank=0)
    assert set(batch.y[:, 1].tolist()) == {np.float32(0.2).item(), np.float32(0.7).item()}
    perfect = batch.y.clamp_min(1e-9).log()
    entropy = -(batch.y * batch.y.log()).sum(1).mean()
    torch.testing.assert_close(task.loss(lambda *_: perfect, batch), entropy)  # nothing is smoothed
    scores = classifier_scores.image_scores(task.model.eval(), patches, device=CPU, labels="score")
    assert 0 < scores["test/score_mae"] < 1
    assert "test/score_mae" not in classifier_scores.image_scores(task.model, patches, device=CPU)


def test_the_fast_backbone_costs_a_quarter_and_sees_every_pixel():
    small, fast = PatchClassifier(2).eval(), PatchClassifier(2, backbone="fast").eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    costs = []
    for model in (small, fast):
        with FlopCounterMode(display=False) as counter:
            model(x)
        costs.append(counter.get_total_flops())
    assert 0.22 < costs[1] / costs[0] < 0.3
    fast(x).sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()
    assert fast.features(x).shape == small.features(x).shape

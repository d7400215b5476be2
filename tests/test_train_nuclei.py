"""Training the nuclei network: crops true to their label maps, artefacts, fine-tuning, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_nuclei import discs, lattice
from PIL import Image

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity import artefacts
from cellflux_bridge.cellularity.augmentation import recolour
from cellflux_bridge.cellularity.label_sets import LabelledImages
from cellflux_bridge.cellularity.network import DIAMETER, FOREGROUND
from cellflux_bridge.cellularity.nuclei import Parameters, segment
from cellflux_bridge.cellularity.settings import LabelSet, NucleiConfig
from cellflux_bridge.cellularity.task import NucleiTask
from cellflux_bridge.cli import main
from cellflux_bridge.images import write_png


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images of discs of radius 8, in groups a and b, with their label maps."""
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    for name, step in (("one", 24), ("two", 32)):
        rgb, labels = discs(lattice(step))
        write_png(tmp_path / "set" / "images" / f"{name}.png", rgb)
        Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "set" / "labels" / f"{name}.png")
    (tmp_path / "set" / "index.csv").write_text("id,group\none,a\ntwo,b\n")
    return tmp_path / "set"


def config_of(folder: Path, **options) -> NucleiConfig:
    return NucleiConfig(name="t", output=folder.parent / "run", **{"sets": [{"folder": folder}], "crop": 64, **options})


# Crops


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_crops_show_the_nuclei_where_their_label_maps_say(folder, scale):
    images = LabelledImages(LabelSet(folder=folder))
    rng = np.random.default_rng(0)
    for _ in range(4):
        crop = images.crop(rng, size=96, scale=scale)
        inside = crop.labels > 0
        red = crop.rgb[..., 0]
        assert crop.rgb.shape == (96, 96, 3)
        assert red[inside].mean() < red[~inside].mean() - 0.2
        assert (red[inside] < 0.75).mean() > 0.9  # edges are mixed
        assert np.allclose(crop.diameters[1:], 16.2 * scale, rtol=0.03)
        whole = [n for n in np.unique(crop.labels)[1:] if not _touches_border(crop.labels == n)]
        for number in whole:
            across = 2 * np.sqrt((crop.labels == number).sum() / np.pi)
            assert across == pytest.approx(16.2 * scale, rel=0.3)  # stretched and bent


def _touches_border(mask: np.ndarray) -> bool:
    return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def test_groups_choose_images_and_unknown_ones_are_named(folder):
    assert len(LabelledImages(LabelSet(folder=folder)).pairs) == 2
    assert [p[0].stem for p in LabelledImages(LabelSet(folder=folder, groups=["b"])).pairs] == ["two"]
    assert [p[0].stem for p in LabelledImages(LabelSet(folder=folder, without=["b"])).pairs] == ["one"]
    with pytest.raises(UserError, match=r"set: no group 'c' in index.csv; known: a, b"):
        LabelledImages(LabelSet(folder=folder, groups=["c"]))
    with pytest.raises(UserError, match="no image is left"):
        LabelledImages(LabelSet(folder=folder, without=["a", "b"]))


# Artefacts


@pytest.mark.parametrize("painter", artefacts.PAINTERS)
def test_under_what_is_opaque_there_is_no_nucleus_and_elsewhere_nothing_changes(painter):
    rgb, labels = discs(lattice(24))
    before = rgb.astype(np.float32) / 255
    for seed in range(3):
        after, left = painter(np.random.default_rng(seed), before.copy(), labels.copy(), 16.0)
        assert after.shape == before.shape
        assert after.min() >= 0
        assert after.max() <= 1
        assert np.array_equal(left[left > 0], labels[left > 0])
        gone = (labels > 0) & (left == 0)
        if gone.any() and painter is not artefacts.mucus:
            assert np.abs(after - before).max(axis=-1)[gone].mean() > 0.05


def test_a_field_of_drawn_cells_has_as_many_diameters_as_numbers():
    crop = artefacts.drawn_field(np.random.default_rng(3), 96, 14.0)
    assert crop.labels.max() == len(crop.diameters) - 1 > 0
    assert crop.rgb[crop.labels > 0].mean() < crop.rgb[crop.labels == 0].mean()


def test_recolouring_keeps_range_and_shape_and_is_a_function_of_its_generators():
    rgb = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def draw() -> torch.Tensor:
        generators = [np.random.default_rng(n) for n in range(3)]
        return recolour(rgb, generators, strength=0.4, generator=torch.Generator().manual_seed(1))

    assert torch.equal(draw(), draw())
    assert draw().shape == rgb.shape
    assert 0 <= draw().min() < draw().max() <= 1
    assert not torch.equal(draw(), rgb)


# The task


def test_one_scale_may_be_asked_for_and_some_weight_must_be(folder):
    task = NucleiTask(config_of(folder, augmentation={"scale": [1, 1]}, train={"batch_size": 2}))
    assert task.batch(0, rank=0).rgb.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="every weight is 0"):
        config_of(folder, sets=[{"folder": folder, "weight": 0}], phantoms=0, drawn=0)


def test_batches_are_functions_of_their_numbers(folder):
    one, other = NucleiTask(config_of(folder)), NucleiTask(config_of(folder))
    first = one.batch(3, rank=0)
    one.batch(4, rank=0)
    for again in (one, other):
        assert all(torch.equal(a, b) for a, b in zip(first, again.batch(3, rank=0), strict=True))
    assert not torch.equal(first.rgb, one.batch(3, rank=1).rgb)


def test_merged_nuclei_teach_the_foreground_alone(folder):
    task = NucleiTask(config_of(folder, train={"batch_size": 4}))
    batch = task.batch(0, rank=0)
    for known in (True, False):
        fields = torch.zeros_like(batch.fields, requires_grad=True)
        task.loss(lambda x, fields=fields: fields, batch._replace(is_known=torch.full((4, 1, 1, 1), known))).backward()
        assert fields.grad[:, FOREGROUND].abs().max() > 0
        assert bool(fields.grad[:, FOREGROUND + 1 :].abs().max() > 0) == known


def test_the_loss_of_the_true_fields_is_the_least(folder):
    task = NucleiTask(config_of(folder, train={"batch_size": 4}, augmentation={"artefacts": 0}))
    batch = task.batch(0, rank=0)
    truth = batch.fields.clone()
    truth[:, FOREGROUND] = 40 * truth[:, FOREGROUND] - 20
    least = task.loss(lambda x: truth, batch)
    assert least < 0.01
    for field in range(1, DIAMETER + 1):
        moved = truth.clone()
        moved[:, field] += 0.3
        assert task.loss(lambda x, moved=moved: moved, batch) > least + 0.01


def test_a_network_learns_discs_within_seconds(folder):
    options = {"augmentation": {"artefacts": 0, "stain": 0.1, "scale": [0.9, 1.1]}, "phantoms": 0, "drawn": 0}
    task = NucleiTask(config_of(folder, network={"widths": [8, 12, 16, 16]}, train={"batch_size": 4}, **options))
    optimiser = torch.optim.AdamW(task.model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        loss = task.loss(task.model, task.batch(step, rank=0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


# The command


def write_config(folder: Path, text: str = "") -> str:
    path = folder.parent / "nuclei.yaml"
    lines = [f"sets: [{{folder: {folder}}}]", f"output: {folder.parent / 'run'}", "crop: 64", text]
    train = "train: {steps: 2, batch_size: 2, validate_every: 1, checkpoint_every: 1, log_every: 1}"
    path.write_text("\n".join([*lines, train]) + "\n")
    return str(path)


def test_fine_tuning_starts_at_the_built_in_weights_and_its_run_counts_nuclei(folder, capsys):
    config = write_config(folder, f"validation: [{{folder: {folder}}}]\nnetwork: {{init_from: built-in}}")
    main(["train-nuclei", config, "train.lr=1e-9"])
    assert "val/f1" in capsys.readouterr().out
    rgb, _ = discs(lattice(24))
    tuned = segment(rgb, parameters=Parameters(model=str(folder.parent / "run")))
    assert tuned.max() == segment(rgb).max() == len(lattice(24))
    main(["train-nuclei", str(folder.parent / "run"), "train.steps=3"])  # goes on where it stopped
    assert (folder.parent / "run" / "checkpoints" / "step-00000003").is_dir()
    half = folder.parent / "run" / "nuclei.safetensors"
    assert half.stat().st_size < 1_000_000
    main(["cellularity", "--label-maps", str(folder), "--model", str(half), "--workers", "1"])
    assert "f1 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network: {init_from: built-in, widths: [8, 8, 8, 8]}", r"nuclei\.safetensors: not the weights .*widths"),
        ("network: {init_from: nowhere.safetensors}", "nowhere.safetensors: cannot be read"),
        ("augmentation: {scale: [2, 0.5]}", "smallest, largest"),
        ("validation: [{folder: x, foreground_only: true}]", "validation counts single nuclei"),
        ("augmentation: {scales: [1, 2]}", "augmentation.scales: unknown key; did you mean 'augmentation.scale'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(folder, text, message):
    with pytest.raises(SystemExit, match=message):
        main(["train-nuclei", write_config(folder, text)])
    assert not (folder.parent / "run").exists()


def test_images_of_another_size_than_their_labels_are_named(folder):
    Image.fromarray(np.zeros((50, 96), np.uint16)).save(folder / "labels" / "two.png")
    with pytest.raises(SystemExit, match=re.escape("two.png: a label map of (50, 96), its image has (96, 96)")):
        main(["train-nuclei", write_config(folder)])

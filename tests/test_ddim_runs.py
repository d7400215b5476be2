"""DDIM stairs from training to trajectories, with networks of others, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchcfm.models.unet.unet import EncoderUNetModel, UNetModel
from toy_ddim import shuffled

from cellflux_bridge import cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.checkpoint import WEIGHTS, latest, load_state
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.ddim.depths import uniform_depths
from cellflux_bridge.ddim.schedule import add_noise, respaced
from cellflux_bridge.ddim.stairs import ddim_stairs
from cellflux_bridge.ddim.steps import NoisePredictor
from cellflux_bridge.ddim.task import STAGES, DenoiserTask, NoisyClassifierTask, build_denoiser, build_noisy_classifier
from cellflux_bridge.trajectory import load_trajectory
from cellflux_bridge.translation.ddim import DDIMTranslator

# --- training and use -------------------------------------------------------------------------------------------------


def tiny_ddim(**keys) -> dict:
    train = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "lr": 2e-3, "ema_decay": 0.5, "accelerator": "cpu"}
    size = {"channels": 32, "multipliers": [1, 1], "attention": [], "head_channels": 16, "resblock_updown": False}
    networks = {name: {**size, "train": {**train, "validate_pairs": 8}} for name in ("denoiser", "classifier")}
    return {"timesteps": 10, **networks, **keys}


@pytest.fixture
def tiny(patch_folder, tmp_path, write_config):
    """The file of a small configuration; keyword arguments are keys of its section."""

    def make(**keys) -> Path:
        split = {"val": 0.2, "test": 0.4}
        return write_config(tmp_path, data={"split": split, "classes": ["A", "B"]}, ddim=tiny_ddim(**keys))

    return make


@pytest.mark.parametrize("task", [DenoiserTask, NoisyClassifierTask])
def test_stain_is_jittered_in_training_and_nothing_else_is_drawn_anew(tiny, task):
    config, jittered = (load_config(tiny(), options) for options in ([], ["data.stain.mode=augment"]))
    patches = load_patches(config.data, seed=0)
    before, after, again = (task(c, patches).batch(2, rank=0) for c in (config, jittered, jittered))
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))
    moved = (after.x0 - before.x0).mean((2, 3))
    assert (moved.abs().amax(1) > 1e-3).all()
    assert len(moved.unique(dim=0)) == len(moved)
    assert torch.equal(after.x0, again.x0)


@pytest.mark.parametrize(("learn_sigma", "guidance"), [(False, "classifier"), (True, "classifier_free")])
def test_denoisers_learn(tiny, learn_sigma, guidance):
    torch.manual_seed(0)
    config = load_config(tiny(learn_sigma=learn_sigma, guidance=guidance, class_dropout=0.5))
    task = DenoiserTask(config, load_patches(config.data, seed=0))
    optimiser = torch.optim.Adam(task.model.parameters(), lr=3e-3)
    before = task.validate(task.model.eval(), torch.device("cpu"))
    head, rows = (w.detach().clone() for w in (task.model.net.out[2].weight, task.model.net.label_emb.weight))
    task.model.train()
    for index in range(25):
        optimiser.zero_grad()
        task.loss(task.model, task.batch(index, rank=0)).backward()
        optimiser.step()
    after = task.validate(task.model.eval(), torch.device("cpu"))
    assert before["val/noise_mse"] == pytest.approx(1, abs=0.1)
    assert after["val/noise_mse"] < 0.6
    assert set(after) >= {"val/noise_mse_early", "val/noise_mse_late", "val/class_swap"}
    moved = (task.model.net.out[2].weight - head).flatten(1).norm(dim=1)
    assert len(moved) == (6 if learn_sigma else 3)
    assert (moved > 1e-3).all()
    null = task.model.net.label_emb.weight[2:]
    assert torch.equal(null, rows[2:]) == (guidance != "classifier_free")  # the null class is told, and learns
    batch = task.batch(0, rank=0)
    assert task.sheet(task.model, torch.device("cpu")) is None
    dropped = batch.y_seen != batch.y
    assert dropped.any() == (guidance == "classifier_free")
    assert (batch.y_seen[dropped] == 2).all()


def test_noisy_classifiers_learn(tiny):
    torch.manual_seed(0)
    config = load_config(tiny())
    task = NoisyClassifierTask(config, load_patches(config.data, seed=0))
    optimiser = torch.optim.Adam(task.model.parameters(), lr=1e-3)
    for index in range(25):
        optimiser.zero_grad()
        loss = task.loss(task.model, task.batch(index, rank=0))
        loss.backward()
        optimiser.step()
    figures = task.validate(task.model.eval(), torch.device("cpu"))
    assert figures["val/accuracy_tau0"] > 0.9
    assert set(figures) == {f"val/accuracy_tau{tau}" for tau in (0, 100, 250, 500, 750)}


def test_batches_are_functions_of_their_number(tiny):
    config = load_config(tiny())
    task = DenoiserTask(config, load_patches(config.data, seed=0))
    first, again, second, other = (task.batch(i, rank=r) for i, r in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first.noise, unlike.noise) for unlike in (second, other))
    many = [task.batch(i, rank=0) for i in range(60)]
    tau, y = torch.cat([b.tau for b in many]), torch.cat([b.y for b in many])
    assert 0 <= tau.min() < 20
    assert 979 < tau.max() <= 999
    assert 440 < tau.float().mean() < 560
    assert 0.4 < y.float().mean() < 0.6
    torch.testing.assert_close(first.x_t, add_noise(first.x0, first.noise, first.tau))


def test_the_class_is_dropped_as_often_as_asked(tiny):
    config = load_config(tiny(guidance="classifier_free", class_dropout=0.1))
    task = DenoiserTask(config, load_patches(config.data, seed=0))
    dropped = torch.cat([task.batch(i, rank=0).y_seen for i in range(100)]) == 2
    assert 0.06 < dropped.float().mean() < 0.14


def test_from_training_to_trajectories(tiny, tmp_path, capsys):
    file, run = str(tiny()), tmp_path / "runs" / "tiny"
    cli.main(["train-ddim", file])
    printed = capsys.readouterr().out
    assert f"trained: {run / 'denoiser' / 'checkpoints' / 'step-00000004'}" in printed
    assert all(name in printed for name in ("val/noise_mse", "val/accuracy_tau0"))
    assert {path.name for path in run.iterdir()} == {"config.yaml", "splits.csv", "denoiser", "noisy_classifier"}

    # In two parts, and from the run folder: bit for bit the same.
    short = [f"ddim.{name}.train.steps=2" for name in ("denoiser", "classifier")]
    cli.main(["train-ddim", file, f"output={tmp_path / 'parts'}", *short])
    cli.main(["train-ddim", str(tmp_path / "parts"), *(text.replace("=2", "=4") for text in short)])
    for stage in STAGES:
        whole, parts = (
            load_state(root / stage / "checkpoints" / "step-00000004") for root in (run, tmp_path / "parts")
        )
        assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    capsys.readouterr()
    cli.main(["train-ddim", str(run)])
    assert capsys.readouterr().out.count("trained already (4 steps)") == 2
    (tmp_path / "parts").rename(tmp_path / "moved")
    cli.main(["train-ddim", str(tmp_path / "moved")])
    assert not (tmp_path / "parts").exists()
    with pytest.raises(SystemExit, match=r"denoiser: holds another run; they differ in ddim\.denoiser\.channels"):
        cli.main(["train-ddim", file, "ddim.denoiser.channels=64"])
    cli.main(["train-ddim", file, "ddim.scale=1.0", "train.lr=0.5", "translate.num=3"])  # not parts of a training

    options = ["translate.num=3", "translate.levels=4", "translate.batch_size=2"]
    translator = DDIMTranslator.load(run, options)
    folder, figures = translator.translate_split(source="A", target="B")
    assert figures["made_now"] == 3
    sequences = load_trajectory(folder)
    assert sequences.header.method == "ddim"
    assert sequences.levels == (0.0, 0.25, 0.5, 0.75, 1.0)
    depths = uniform_depths(10, 4)
    assert set(sequences.nfe) == {depths[-1] + sum(depths)}
    assert set(sequences.gradients) == {sum(depths)}
    np.testing.assert_array_equal(sequences.depths.T, [[0, *depths]] * 3)
    np.testing.assert_allclose(sequences.soft_labels[2], [[0.5, 0.5]] * 3)
    patches = load_patches(translator.config.data, seed=0)
    sources = torch.from_numpy(sequences.frames[0])
    assert torch.equal(sources, patches.centre([patches.ids.index(name) for name in sequences.source_ids]))
    assert translator.translate_split(source="A", target="B")[1]["made_now"] == 0

    # Alone, and by another batch size, an image comes to the same.
    alone = DDIMTranslator.load(run, options).translate(sources[1:2], source="A", target="B", batch_size=1)
    assert np.abs(alone.frames[:, 0].astype(int) - sequences.frames[:, 1]).max() <= 1
    unguided = DDIMTranslator.load(run, [*options, "ddim.scale=0"]).translate(sources, source="A", target="B")
    assert set(unguided.gradients) == {0}
    assert unguided.header.config_hash != sequences.header.config_hash

    # Networks that were trained again, to the same step, make other sequences.
    for stage in STAGES:
        file = latest(run / stage) / WEIGHTS
        save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)
        with pytest.raises(UserError, match="what differs: settings or weights"):
            DDIMTranslator.load(run, options).translate_split(source="A", target="B")
        DDIMTranslator.load(run, options).translate_split(source="A", target="B", overwrite=True)


def test_what_does_not_fit_is_said(tiny, tmp_path):
    file, run = tiny(), tmp_path / "runs" / "tiny"
    with pytest.raises(UserError, match="denoiser: holds no checkpoint"):
        DDIMTranslator.load(file)
    cli.main(["train-ddim", str(file), "ddim.guidance=none"])
    assert not (run / "noisy_classifier").exists()
    for overrides, message in (
        ([], "noisy_classifier: holds no checkpoint"),
        (["ddim.guidance=classifier_free"], "has no null class"),
        (["ddim.denoiser.channels=64"], r"was trained otherwise .*ddim\.denoiser\.channels"),
        (["data.image_size=32"], r"was trained otherwise .*data\.image_size"),
        (["ddim.timesteps=61"], "no stride takes 61 of 1000"),
        (["ddim.denoiser={weights: nowhere.pt, new_attention_order: false}"], "nowhere.pt is not there"),
    ):
        with pytest.raises(UserError, match=message):
            DDIMTranslator.load(file, ["ddim.guidance=none"] * (overrides != []) + overrides)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for overrides, options, message in (
        ([], {"steps": 3}, r"translate\.steps: DDIM stairs do not read it"),
        ([], {"levels": [0.5, 1.0]}, "levels of DDIM stairs are nominal"),
        ([], {"levels": 10}, "10 levels do not fit"),
        (["ddim.depths=[2, 10]"], {"levels": 2}, r"translate\.levels: not read where ddim\.depths lists"),
        (["ddim.depths=[3, 11]"], {}, "must rise strictly from 1 to at most 10"),
        (["ddim.depths=fourier"], {"levels": 3}, "20 px or more"),
        ([], {"source": "C"}, "'C' is no class"),
    ):
        translator = DDIMTranslator.load(run, ["ddim.guidance=none", *overrides])
        with pytest.raises(UserError, match=message):
            translator.translate(images, **options)
    with pytest.raises(UserError, match=r"translate\.method: DDIM stairs do not read it"):
        DDIMTranslator.load(run, ["ddim.guidance=none", "translate.method=depth"]).translate_split()
    made = DDIMTranslator.load(run, ["ddim.guidance=none", "ddim.depths=[2, 10]"]).translate(images)
    assert (made.levels, made.nfe, made.gradients) == ((0.0, 0.5, 1.0), (22,), (0,))


def test_foreign_weights_take_the_place_of_training(tiny, tmp_path):
    stated = {"new_attention_order": False}
    sizes = tiny_ddim()
    denoiser = shuffled(build_denoiser(load_config(tiny())))
    other = shuffled(build_denoiser(load_config(tiny())), seed=1)
    classifier = shuffled(build_noisy_classifier(load_config(tiny())), seed=2)
    for name, network in (("d", denoiser), ("o", other), ("c", classifier)):
        torch.save(network.net.state_dict(), tmp_path / f"{name}.pt")
    foreign = {
        "denoiser": {**sizes["denoiser"], "weights": str(tmp_path / "d.pt"), **stated},
        "source_denoiser": {**sizes["denoiser"], "weights": str(tmp_path / "o.pt"), **stated},
        "classifier": {**sizes["classifier"], "weights": str(tmp_path / "c.pt"), **stated},
    }
    file = tiny(**foreign)
    with pytest.raises(SystemExit, match="nothing to train"):
        cli.main(["train-ddim", str(file)])
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    translator = DDIMTranslator.load(file)
    made = translator.translate(images, levels=2)
    expected = ddim_stairs(
        images.float() / 127.5 - 1,
        torch.tensor([0, 0]),
        torch.tensor([1, 1]),
        schedule=respaced(10),
        encoder=NoisePredictor(other.eps),
        decoder=NoisePredictor(denoiser.eps),
        depths=torch.tensor([5, 9]),
        classifier=classifier,
        scale=2.0,
    ).frames
    expected = ((expected + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(made.frames - expected.numpy()).max() <= 1
    first = made.header.config_hash
    torch.save(shuffled(build_denoiser(load_config(tiny())), seed=5).net.state_dict(), tmp_path / "d.pt")
    assert DDIMTranslator.load(tiny(**foreign)).translate(images, levels=2).header.config_hash != first
    # A denoiser of others' and a classifier of one's own.
    cli.main(["train-ddim", str(tiny(denoiser=foreign["denoiser"]))])
    run = tmp_path / "runs" / "tiny"
    assert not (run / "denoiser").exists()
    assert (run / "noisy_classifier" / "checkpoints").is_dir()
    assert DDIMTranslator.load(run).translate(images, levels=2).nfe == (23, 23)


def test_classifier_free_stairs_train_and_translate(tiny, tmp_path):
    cli.main(["train-ddim", str(tiny(guidance="classifier_free"))])
    run = tmp_path / "runs" / "tiny"
    assert not (run / "noisy_classifier").exists()
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    made = DDIMTranslator.load(run).translate(images, levels=3)
    depths = uniform_depths(10, 3)
    assert (made.nfe, made.gradients) == ((2 * (depths[-1] + sum(depths)),), (0,))
    assert DDIMTranslator.load(run, ["ddim.guidance=none"]).translate(images, levels=3).nfe[0] * 2 == made.nfe[0]


def test_a_flows_folder_is_not_taken(tiny, tmp_path):
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds a flow's run; choose another output"):
        cli.main(["train-ddim", str(tiny())])
    with pytest.raises(SystemExit, match=r"ddim\.classifier\.train\.precision: both networks"):
        cli.main(["train-ddim", str(tiny()), "ddim.classifier.train.precision=bf16-mixed"])


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["ddim_phantom", "ddim_lung"])
def test_the_shipped_configurations_build_at_their_stated_sizes(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    sizes = [sum(p.numel() for p in build(config).parameters()) for build in (build_denoiser, build_noisy_classifier)]
    assert 4e6 < sizes[0] < 6e6
    assert sizes[1] < 1.5e6
    assert uniform_depths(config.ddim.timesteps, config.translate.levels)[-1] == 99
    json.dumps(config.model_dump(mode="json"))


# --- networks that Cellflow trained -----------------------------------------------------------------------------------

FREE = ("ddim.guidance=classifier_free", "data.image_size=512", "ddim.denoiser.multipliers=[0.5, 1, 1, 2, 2, 4, 4]")


@pytest.mark.parametrize(("overrides", "size"), [((), 552_816_134), (FREE, 557_976_710)], ids=["256", "512"])
def test_cellflows_denoisers_build_at_their_full_size(overrides, size):
    config = load_config(CONFIGS / "ddim_cellflow.yaml", overrides)
    side = config.data.image_size
    with torch.device("meta"):
        denoiser = build_denoiser(config)
        x, one = torch.empty(1, 3, side, side), torch.zeros(1, dtype=torch.long)
        assert denoiser(x, one, one).shape == (1, 6, side, side)
        multipliers = {"multipliers": config.ddim.denoiser.multipliers}
        ddim = config.ddim.model_copy(update={"classifier": config.ddim.classifier.model_copy(update=multipliers)})
        assert build_noisy_classifier(config.model_copy(update={"ddim": ddim}))(x, one).shape == (1, 2)
    assert abs(sum(p.numel() for p in denoiser.parameters()) - size) <= 1024  # the null class is a row


def cellflow_networks(folder: Path, *, is_free: bool) -> list[str]:
    """Two denoisers and a classifier as Cellflow saves them, and settings that make its configuration fit them."""
    channels, multipliers = (64, (0.5, 0.5)) if is_free else (32, (1, 1))
    shared = {"image_size": 24, "in_channels": 3, "model_channels": channels, "num_res_blocks": 1}
    shared |= {"num_head_channels": 16, "channel_mult": multipliers, "attention_resolutions": (2,)}
    shared |= {"use_scale_shift_norm": True, "resblock_updown": True}
    for seed, order in enumerate((False, True)):
        net = UNetModel(out_channels=6, num_classes=2, use_new_attention_order=order, **shared)
        weights = shuffled(net, seed=seed).state_dict()
        if is_free:
            class_emb = shuffled(nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256)), seed=7)
            weights |= {f"class_emb.{name}": value for name, value in class_emb.state_dict().items()}
        (folder / str(order)).mkdir()
        torch.save(weights, folder / str(order) / "model000100.pt")
    classifier = shuffled(EncoderUNetModel(out_channels=2, pool="attention", **shared))
    torch.save(classifier.state_dict(), folder / "classifier.pt")
    sizes = (f"channels={channels}", f"multipliers={list(multipliers)}", "blocks=1", "attention=[12]")
    sizes += ("head_channels=16",)
    return [f"ddim.{name}.{size}" for name in ("denoiser", "classifier") for size in sizes]


@pytest.mark.parametrize("is_free", [False, True])
def test_cellflows_own_weights_translate(tmp_path, patch_folder, is_free, capsys):
    sizes = cellflow_networks(tmp_path, is_free=is_free)
    overrides = [f"data.root={patch_folder}", f"ddim.denoiser.weights={tmp_path / str(not is_free) / 'model000100.pt'}"]
    overrides += [f"ddim.source_denoiser.weights={tmp_path / str(is_free) / 'model000100.pt'}"]
    overrides += [f"ddim.source_denoiser.new_attention_order={str(is_free).lower()}"]
    if is_free:
        overrides += ["ddim.guidance=classifier_free", "ddim.denoiser.new_attention_order=false"]
    else:
        overrides += [f"ddim.classifier.weights={tmp_path / 'classifier.pt'}"]
    small = [
        "data.classes=[A, B]",
        "data.image_size=24",
        "data.enlarge=true",
        "ddim.timesteps=6",
        "translate.num=2",
        "translate.levels=2",
    ]
    small += [f"data.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'run'}"]
    small += ["ddim.denoiser.train.accelerator=cpu", "ddim.classifier.train.accelerator=cpu"]
    cli.main(["translate", str(CONFIGS / "ddim_cellflow.yaml"), *overrides, *small, *sizes, "--source=A", "--target=B"])
    folder = tmp_path / "run" / "trajectories" / "A_to_B_ddim"
    made = load_trajectory(folder)
    assert made.frames.shape == (3, 2, 3, 24, 24)
    assert (np.diff(made.depths, axis=0) > 0).all()
    decoded = made.depths.sum(0).astype(int)
    assert list(made.nfe) == [(6 + depths) * (1 + is_free) for depths in decoded]
    assert list(made.gradients) == [0 if is_free else depths for depths in decoded]
    cli.main(["export", str(folder)])
    assert f"wrote: {folder / 'cellflow' / 'A_B'}" in capsys.readouterr().out
    assert np.load(folder / "cellflow" / "A_B" / "diffway.npy").tolist() == made.depths[1:].T.tolist()

"""Checkpoints: complete or absent, checked strictly, and never unpickled."""

import errno
import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from cellflux_bridge import Bridge, checkpoint
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier import inference
from cellflux_bridge.config import Config, load_config
from cellflux_bridge.data.preprocessing import Preprocessing
from cellflux_bridge.ddim.task import build_denoiser
from cellflux_bridge.flow.network import build_flow
from cellflux_bridge.images.stain import StainReference
from cellflux_bridge.translation.ddim import DDIMTranslator


@pytest.fixture
def config(tmp_path, write_config) -> Config:
    return load_config(write_config(tmp_path), ["data.classes=[A, B]"])


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 2))


@pytest.fixture
def save(config, tmp_path):
    def save(step: int, *, model: nn.Module | None = None, keep: int = 1) -> Path:
        weights = (model or network()).to(memory_format=torch.channels_last).state_dict()
        return checkpoint.save(
            tmp_path / "run",
            step=step,
            weights=weights,
            state={"step": step, "seconds": 1.5, "model": weights, "optimiser": {"state": {}, "param_groups": []}},
            config=config,
            preprocessing=Preprocessing(16, 18, StainReference("reinhard", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))),
            keep=keep,
        )

    return save


def test_what_is_saved_comes_back(save, config, tmp_path):
    model = network()
    folder = save(7, model=model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "preprocessing.json",
        "state.pt",
    ]
    other = network()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights(folder, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert checkpoint.load_state(folder)["seconds"] == 1.5
    assert checkpoint.read_config(folder) == config
    loaded = Preprocessing.load(folder / "preprocessing.json")
    assert loaded == Preprocessing(16, 18, StainReference("reinhard", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
    assert checkpoint.step_of(folder) == 7


def test_the_newest_is_found_from_the_run_or_the_checkpoint_itself(save, tmp_path):
    save(9, keep=3), save(100, keep=3)
    assert checkpoint.latest(tmp_path / "run").name == "step-00000100"
    nine = tmp_path / "run" / "checkpoints" / "step-00000009"
    assert checkpoint.latest(nine) == nine
    shutil.copytree(nine, tmp_path / "best")
    assert checkpoint.latest(tmp_path / "best") == tmp_path / "best"
    assert checkpoint.step_of(tmp_path / "best") == 0


@pytest.mark.parametrize("make", ["nothing", "folder", "empty", "half"])
def test_a_missing_checkpoint_is_a_users_mistake(tmp_path, make):
    run = tmp_path / "run"
    places = {"folder": run, "empty": run / "checkpoints", "half": run / "checkpoints" / "step-00000003.tmp"}
    if make in places:
        places[make].mkdir(parents=True)
    with pytest.raises(UserError, match="run: holds no checkpoint; expected a run folder that training wrote"):
        checkpoint.latest(run)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_named(save, size):
    path = save(3) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"step-00000003/model\.safetensors: truncated or not a weights file"):
        checkpoint.load_weights(path.parent, network())


def test_sizes_are_compared_before_memory_is_taken(save):
    """A terabyte of weights, and a state that is unpacked to far more than its file holds."""
    folder = save(3)
    header = json.dumps(
        {"0.weight": {"dtype": "F32", "shape": [500_000, 500_000], "data_offsets": [0, 10**12]}}
    ).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10**12)  # a sparse file
    with pytest.raises(UserError, match=r"model\.safetensors: of another architecture .* 1 of another shape"):
        checkpoint.load_weights(folder, network())
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "state.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(UserError, match=r"state\.pt: .*it declares 10,000,000 bytes, expected at most"):
        checkpoint.load_state(folder)


def test_missing_weights_are_named(save):
    path = save(3) / "model.safetensors"
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.load_weights(path.parent, network())


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_training_state_is_named(save, size):
    path = save(3) / "state.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"step-00000003/state\.pt: truncated or not a training state"):
        checkpoint.load_state(path.parent)


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 no zip", bytes(range(256)) * 40])
def test_any_other_bytes_are_no_training_state(save, content):
    path = save(3) / "state.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt: truncated or not a training state"):
        checkpoint.load_state(path.parent)


class _Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_nothing_is_unpickled(save, tmp_path, write):
    path, proof = save(3) / "state.pt", tmp_path / "executed"
    write({"step": 3, "model": _Malicious(proof)}, path)
    with pytest.raises(UserError, match=r"state\.pt"):
        checkpoint.load_state(path.parent)
    path.replace(path.parent / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.load_weights(path.parent, network())
    assert not proof.exists()


def test_another_architecture_is_refused_with_what_differs(save):
    folder = save(3, model=network(4))
    with pytest.raises(UserError, match=r"0 tensors missing .* 0 unknown .* \d of another shape \['0\.bias'"):
        checkpoint.load_weights(folder, network(6))
    deeper = nn.Sequential(*network(4), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"another architecture.* 2 tensors missing \['3\.bias', '3\.weight'\]"):
        checkpoint.load_weights(folder, deeper)
    with pytest.raises(UserError, match=r"2 unknown \['2\.bias', '2\.weight'\]"):
        checkpoint.load_weights(folder, network(4)[:2])


@pytest.mark.parametrize("where", ["save_file", "torch.save"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_keeps_the_earlier_checkpoint(save, tmp_path, monkeypatch, where, earlier):
    if earlier:
        save(3)

    def full(content, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"cellflux_bridge.checkpoint.{where}", full)
    kept = "the last good checkpoint is .*step-00000003" if earlier else "no earlier checkpoint exists"
    with pytest.raises(UserError, match=rf"step-00000005: cannot be written.*is the disk full\? {kept}"):
        save(5)
    found = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert found == (["step-00000003"] if earlier else [])


def test_a_checkpoint_is_renamed_into_place_when_complete(save, tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def note(source, target):
        seen.append((Path(source).name, Path(target).name, sorted(path.name for path in Path(source).iterdir())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    save(5)
    files = ["config.yaml", "model.safetensors", "preprocessing.json", "state.pt"]
    assert seen == [("step-00000005.tmp", "step-00000005", files)]


def test_older_checkpoints_go_only_when_the_new_one_stands(save, tmp_path, monkeypatch):
    save(1), save(2)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000002"]

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(3)
    assert checkpoint.latest(tmp_path / "run").name == "step-00000002"
    monkeypatch.undo()
    assert save(3).name == "step-00000003"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


# What comes from somebody else: a small weights file beside a configuration that asks for a huge network

_KINDS = {  # where its checkpoint lies in a run, how it is built, how it is loaded
    "flow": ("", lambda config: build_flow(config)[1], Bridge.load),
    "classifier": (
        "",
        inference.build_classifier,
        lambda run: inference.load(checkpoint.latest(run), torch.device("cpu")),
    ),
    "ddim": ("denoiser", build_denoiser, DDIMTranslator.load),
}


@pytest.fixture
def received(tmp_path, write_config):
    """`received(kind, "key=value", ...)`: an untrained run whose configuration says otherwise since it was saved."""

    def make(kind: str, *overrides: str) -> Path:
        small = {"channels": 32, "multipliers": [1, 1], "attention": [], "head_channels": 16}
        ddim = {"denoiser": small, "guidance": "none"}
        config = load_config(write_config(tmp_path, data={"classes": ["A", "B"]}, ddim=ddim))
        run, part = config.output, config.output / _KINDS[kind][0]
        weights, preprocessing = _KINDS[kind][1](config).state_dict(), Preprocessing(16, None)
        options = {"state": {}, "preprocessing": preprocessing, "keep": 1}
        folder = checkpoint.save(part, step=1, weights=weights, config=config, **options)
        (run / "config.yaml").write_text(config.to_yaml())
        for file in (run / "config.yaml", folder / "config.yaml"):
            file.write_text(load_config(file, overrides).to_yaml())
        return run

    return make


_HUGE = {
    "flow": ("velocity.channels=60000",),
    "classifier": ("classifier.backbone=vit_giant_patch14_224", "data.image_size=224"),
    "ddim": ("ddim.denoiser.channels=320000",),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_network_larger_than_its_weights_is_refused_before_it_takes_memory(received, kind):
    run = received(kind, *_HUGE[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"model\.safetensors: of another architecture than its config\.yaml describes"):
        _KINDS[kind][2](run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(("kind", "key"), [("flow", "velocity.patch"), ("ddim", "ddim.denoiser.channels")])
def test_sizes_that_torch_cannot_count_are_a_mistake_in_the_configuration(received, kind, key):
    run = received(kind, f"{key}={32 * 10**8}")
    with pytest.raises(UserError, match=r"config\.yaml: describes no network that can be built"):
        _KINDS[kind][2](run)


@pytest.mark.parametrize("key", ["velocity.blocks", "ddim.denoiser.blocks"])
def test_layers_are_few(received, key):
    with pytest.raises(UserError, match=rf"{key}.*less than or equal to 128"):
        received("flow", f"{key}=1000000000")


def test_a_network_that_fits_is_the_one_that_was_built(save):
    """Also what the weights do not hold: buffers that the constructor computes."""

    def build() -> nn.Module:
        model = network()
        model.register_buffer("scale", torch.rand(3), persistent=False)
        return model

    model = build()
    loaded = checkpoint.load_network(save(3, model=model), build)
    for own, other in zip(
        [*model.parameters(), *model.buffers()], [*loaded.parameters(), *loaded.buffers()], strict=True
    ):
        assert torch.equal(own, other)

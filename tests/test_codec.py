"""Codecs: there and back, differentiable, and a flow that lives in the space of another one than pixels."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cellflux_bridge import cli
from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.inference import build_classifier
from cellflux_bridge.classifier.task import ClassifierTask
from cellflux_bridge.codec.base import Codec, build_codec
from cellflux_bridge.codec.pixels import Pixels
from cellflux_bridge.config import load_config
from cellflux_bridge.data.patches import load_patches
from cellflux_bridge.flow.task import FlowTask
from cellflux_bridge.images import decode, encode
from cellflux_bridge.trajectory import load_trajectory


class Folded(Codec):
    """Squares of pixels folded into channels: a codec with a stride, more channels and a scale, which loses nothing."""

    def __init__(self, channels: int, *, stride: int = 2, scale: float = 0.5):
        super().__init__()
        self.channels, self.stride, self.scale = channels * stride**2, stride, scale

    def to_code(self, images):
        return F.pixel_unshuffle(images, self.stride)

    def to_images(self, code):
        return F.pixel_shuffle(code, self.stride)


FOLDED = {"name": "test_codec:Folded"}


def patches(num: int = 3, size: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=draw)


@pytest.mark.parametrize("codec", [Pixels(3), Folded(3), Folded(3, stride=4, scale=3.0)])
def test_images_come_back_from_single_states_and_from_sequences(codec):
    x = codec.encode(patches())
    assert x.shape == (3, codec.channels, 8 // codec.stride, 8 // codec.stride)
    assert torch.equal(codec.to_uint8(x), patches())
    assert torch.equal(codec.encode(encode(patches())), x)  # stain is jittered in [-1, 1]
    sequences = torch.stack([x, x.flip(0)])
    assert torch.equal(codec.to_uint8(sequences), torch.stack([patches(), patches().flip(0)]))
    assert x.std().item() == pytest.approx(codec.scale * encode(patches()).std().item(), rel=1e-4)


def test_pixels_are_the_identity_to_the_bit():
    x = Pixels(3).encode(patches())
    assert torch.equal(x, encode(patches()))
    assert Pixels(3).decode(x) is not None
    assert torch.equal(Pixels(3).decode(1.7 * x), 1.7 * x)  # values outside [-1, 1] are clipped in uint8 alone
    assert torch.equal(Pixels(3).to_uint8(1.7 * x), decode(1.7 * x))


def test_gradients_go_through_decoding():
    codec, x = Folded(3), Folded(3).encode(patches()).requires_grad_()
    codec.decode(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() / codec.scale**2)


@pytest.fixture
def folded(patch_folder, tmp_path, write_config):
    """`folded(**sections) -> configuration file` of a run whose flow lives in folded pixels."""

    def make(**sections):
        train = {"batch_size": 4, "steps": 2, "validate_pairs": 4, "sample_every": 2, "accelerator": "cpu"}
        return write_config(
            tmp_path, **{"codec": FOLDED, "condition": {"source_image": True}, "train": train, **sections}
        )

    return make


@pytest.mark.parametrize("part", ["Darkness", "Corners", "Mask"])
def test_a_flow_in_another_space_told_a_part_of_the_users_own_is_trained_and_translates(folded, tmp_path, part):
    """A vector, tokens and a map: each is one class, and one line of the configuration."""
    condition = {"source_image": True, "parts": [{"name": f"test_velocity:{part}"}]}
    file = folded(condition=condition, velocity={"attention": [1]})
    cli.main(["train", str(file)])
    run = tmp_path / "runs/tiny"
    with pytest.raises(SystemExit, match="--trust"):
        cli.main(["translate", str(run), "--source", "A", "--target", "B"])
    short = ["translate.num=2", "translate.steps=2", "translate.method=path", "translate.frames=3"]
    cli.main(["translate", str(run), "--source", "A", "--target", "B", "--trust", *short])
    (found,) = (run / "trajectories").iterdir()
    assert load_trajectory(found).frames.shape == (3, 2, 3, 16, 16)


def test_a_flow_in_another_space_is_trained_and_translates(folded, tmp_path):
    config = load_config(folded(), ["data.classes=[A, B]"])
    task = FlowTask(config, load_patches(config.data, seed=0))
    batch = task.states(task.batch(0, rank=0))
    assert batch.x_t.shape == batch.cond.source_image.shape == (4, 12, 8, 8)
    cli.main(["train", str(folded())])
    run = tmp_path / "runs/tiny"
    assert len(list((run / "samples").iterdir())) == 1
    quick = [f"classifier.train.{key}" for key in ("steps=2", "batch_size=4", "accelerator=cpu")]
    cli.main(
        ["train-classifier", str(run), "--trust", "classifier.role=guide", *quick]
    )  # sees images, whatever the codec
    short = [f"translate.{key}" for key in ("num=2", "frames=3", "steps=2", "method=path", "guidance.form=endpoint")]
    cli.main(["translate", str(run), "--trust", "--source", "A", "--target", "B", *short])
    (folder,) = (run / "trajectories").iterdir()
    made = load_trajectory(folder)
    assert made.frames.shape == (3, 2, 3, 16, 16)
    data = load_patches(config.data, seed=0)
    sources = data.centre([data.ids.index(name) for name in made.source_ids])
    np.testing.assert_array_equal(made.frames[0], sources)
    assert (made.frames[-1] != made.frames[0]).mean() > 0.5
    guide = ["classifier.role=guide", "classifier.sees=state", "pairs.identity=true"]
    seeing = load_config(folded(), ["data.classes=[A, B]", *guide])
    states = ClassifierTask(seeing, load_patches(config.data, seed=0)).batch(0, rank=0)
    assert states.x.shape == states.x0.shape == (64, 12, 8, 8)


def test_a_size_that_does_not_fit_is_refused(folded):
    config = load_config(folded(), ["data.classes=[A, B]"])
    odd = config.model_copy(update={"data": config.data.model_copy(update={"image_size": 17})})
    with pytest.raises(
        UserError, match=r"data\.image_size=17: not divisible by the stride 2 of codec\.name=test_codec"
    ):
        build_codec(odd)


def test_channels_other_than_three_are_counted_or_refused(folded, tmp_path):
    grey = ["data.classes=[A, B]", "data.channels=5"]
    config = load_config(folded(), grey)
    assert build_codec(config).channels == 20
    assert build_classifier(config)(torch.zeros(2, 5, 16, 16)).shape == (2, 2)
    with pytest.raises(UserError, match=r"a picture; data\.channels=5 is read from \.npy files"):
        load_patches(config.data, seed=0)
    with pytest.raises(UserError, match=r"stain\.mode=augment is for RGB images only, found channels=5"):
        load_config(folded(), [*grey, "data.stain.mode=augment"])
    with pytest.raises(UserError, match=r"view=grey.*for RGB images only, found 5"):
        build_classifier(load_config(folded(), [*grey, "classifier.view=grey"]))

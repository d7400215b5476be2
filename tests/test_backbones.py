"""Classifiers of a study: every family can be built, sees patches at its own size, and says what it lacks."""

import json

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.study import backbones
from cellflux_bridge.study.backbones import Backbone
from cellflux_bridge.study.settings import BackboneConfig

# The families of Cellflow's table, with MaxViT and CoAtNet for its hybrids of convolution and attention.
FAMILIES = (
    *("small", "vgg16", "vgg19", "resnet18", "resnet50", "xception41", "mobilenetv3_small_100", "efficientnet_b0"),
    *("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "coatnet_0_rw_224", "maxvit_tiny_tf_224"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tells_classes_of_small_patches(name):
    with torch.device("meta"):
        network = Backbone(BackboneConfig(name=name), 3, patch_size=64).eval()
        x = torch.zeros(2, 3, 64, 64)
        assert network(x).shape == (2, 3)
        assert network.features(x).shape == (2, network.head.in_features)
    fixed = any(word in name for word in ("vit", "swin", "coatnet"))
    assert network.size == (224 if fixed else 64)


def test_a_network_for_large_images_says_so_and_sees_enlarged_patches():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"inception_v3 cannot see patches of 32 px .*such as size=224"):
            Backbone(BackboneConfig(name="inception_v3"), 2, patch_size=32)
        network = Backbone(BackboneConfig(name="inception_v3", size=96), 2, patch_size=32).eval()
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_patches_are_normalised_and_enlarged_as_the_weights_ask():
    network = Backbone(BackboneConfig(name="resnet10t", size=48), 2, patch_size=24).eval()
    seen = []
    network.net.forward_features = lambda x: seen.append(x) or torch.zeros(len(x), network.net.num_features, 1, 1)
    network(torch.ones(1, 3, 24, 24))
    mean, std = (torch.tensor(timm.get_pretrained_cfg("resnet10t").to_dict()[key]) for key in ("mean", "std"))
    assert seen[0].shape == (1, 3, 48, 48)
    assert torch.allclose(seen[0].mean((0, 2, 3)), (1 - mean) / std, atol=1e-5)


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'resnet5?\d?t?"):
        Backbone(BackboneConfig(name="resnet5O"), 2, patch_size=32)


def hub_folder(folder, *, registers: int):
    """A tiny vision transformer as a folder downloaded from the hub, and its network."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "reg_tokens": registers}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    folder.mkdir()
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0, "fixed_input_size": True}
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(about))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval()


@pytest.mark.parametrize("registers", [None, 4])
def test_a_foundation_model_comes_from_a_local_folder_with_its_own_features(tmp_path, monkeypatch, registers):
    known = hub_folder(tmp_path / "weights", registers=registers or 0)
    monkeypatch.setitem(backbones.PRESETS, "uni", backbones._Preset("hf-hub:a/b", dict, registers=registers))
    network = Backbone(BackboneConfig(name="uni", weights=tmp_path / "weights", frozen=True), 2, patch_size=32).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tokens = known.forward_features(((x + 1) / 2 - 0.5) / 0.25)
        first, rest = tokens[:, 0], tokens[:, 5:].mean(1)
        expected = first if registers is None else torch.cat([first, rest], dim=1)
        assert torch.allclose(network.features(x), expected, atol=1e-5)
    assert network(x).shape == (2, 2)


def test_weights_that_cannot_be_fetched_are_named_with_a_way_out(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(backbones.timm, "create_model", no_network)
    with pytest.raises(
        UserError, match=r"weights of virchow2 \(hf-hub:paige-ai/Virchow2\) cannot be fetched.*weights:"
    ):
        Backbone(BackboneConfig(name="virchow2"), 2, patch_size=224)
    with pytest.raises(UserError, match="no such folder"):
        Backbone(BackboneConfig(name="virchow2", weights=tmp_path / "missing"), 2, patch_size=224)


def test_a_received_study_fetches_no_backbone(tmp_path):
    with pytest.raises(ValidationError, match="pass --trust"):
        BackboneConfig(name="hf-hub:somebody/model")


def test_published_arguments_of_foundation_models_build_their_architecture():
    with torch.device("meta"):
        virchow2 = timm.create_model(
            "vit_huge_patch14_224", num_classes=0, reg_tokens=4, **backbones.PRESETS["virchow2"].arguments()
        )
        uni = timm.create_model("vit_large_patch16_224", num_classes=0, **backbones.PRESETS["uni"].arguments())
    assert virchow2.blocks[0].mlp.__class__.__name__ == "SwiGLUPacked" or hasattr(virchow2.blocks[0].mlp, "gate_last")
    assert uni.patch_embed.strict_img_size is False

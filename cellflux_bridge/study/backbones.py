"""Classifiers of a study: the built-in small one, any timm model, and foundation models of pathology."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.classifier.model import SmallCNN
from cellflux_bridge.config.schema import nearest
from cellflux_bridge.study.settings import BackboneConfig


def _swiglu() -> dict[str, Any]:
    return {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}


class _Preset(NamedTuple):
    """A foundation model as its card says to build it. `registers`: how many of them follow the class token, where
    features are the class token beside the mean of the patch tokens; None where they are as timm has them."""

    hub: str
    arguments: Callable[[], dict[str, Any]]
    registers: int | None = None


# https://huggingface.co/MahmoodLab/UNI and https://huggingface.co/paige-ai/Virchow2 (gated: terms are accepted there).
PRESETS = {
    "uni": _Preset("hf-hub:MahmoodLab/uni", lambda: {"init_values": 1e-5, "dynamic_img_size": True}),
    "virchow2": _Preset("hf-hub:paige-ai/Virchow2", _swiglu, registers=4),
}


class Backbone(nn.Module):
    """Class logits (B, num_classes) of RGB patches (B, 3, S, S) in [-1, 1].

    Patches are brought to the network's input size and normalised as its weights ask. `features` are the inputs (B, D)
    of `head`, the last layer.
    """

    def __init__(self, config: BackboneConfig, num_classes: int, *, patch_size: int):
        super().__init__()
        require_weights(config)
        self.size, preset = config.size or patch_size, PRESETS.get(config.name)
        mean = std = (0.5,) * 3
        self._registers = preset.registers if preset else None
        if config.name == "small":
            self.net = SmallCNN(3, num_classes)
            self.net.head = nn.Identity()  # `head` takes its place
        else:
            self.net, data = _timm_network(config, preset)
            mean, std = data["mean"], data["std"]
            self.size = config.size or (data["input_size"][-1] if data["fixed_input_size"] else self.size)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        try:
            with torch.no_grad():
                width = self.eval().features(torch.zeros(1, 3, patch_size, patch_size)).shape[1]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"backbones: {config.name} cannot see patches of {self.size} px ({error}); set a larger size, to which "
                "patches are enlarged, such as size=224"
            ) from error
        self.head = nn.Linear(width, num_classes)
        self.train()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        found = self.net.forward_features(((x + 1) / 2 - self.mean) / self.std)
        if self._registers is not None:
            return torch.cat([found[:, 0], found[:, 1 + self._registers :].mean(1)], dim=1)
        return self.net.forward_head(found, pre_logits=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def _timm_network(config: BackboneConfig, preset: _Preset | None) -> tuple[nn.Module, dict[str, Any]]:
    """A timm network without its last layer, and its data configuration."""
    arguments, name = preset.arguments() if preset else {}, preset.hub if preset else config.name
    if config.weights is not None:
        if not config.weights.is_dir():
            raise UserError(f"backbones: {config.name}: weights={config.weights}: no such folder")
        name = f"local-dir:{config.weights}" if preset or ":" in name else name
    is_local = config.weights is not None and not name.startswith("local-dir:")
    if is_local:  # a plain timm name with its weights in a folder
        found = [*config.weights.glob("*.safetensors"), *config.weights.glob("*.bin")]
        if len(found) != 1:
            raise UserError(
                f"{config.weights}: expected one file of weights (.safetensors or .bin), found {len(found)}"
            )
        arguments["pretrained_cfg_overlay"] = {"file": str(found[0])}
    make = partial(timm.create_model, name, pretrained=_has_weights(config, preset), **arguments)
    try:
        if config.size is not None and _is_of_fixed_size(name):
            make = partial(make, img_size=config.size)
        net = make(num_classes=0)
    except RuntimeError as error:
        known = timm.list_models()
        raise UserError(
            f"backbones: {error}{nearest(config.name, [*known, *PRESETS, 'small'])}; expected 'small', a timm model "
            f"name, or {' or '.join(PRESETS)}"
        ) from error
    except OSError as error:  # what the hub's client raises where it cannot reach the hub
        raise UserError(
            f"backbones: the weights of {config.name} ({name}) cannot be fetched ({type(error).__name__}). Download "
            "them once where there is a network (gated models: accept their terms and log in), and name their folder: "
            "weights: /path/to/folder"
        ) from error
    data = timm.data.resolve_model_data_config(net)
    data["fixed_input_size"] = net.pretrained_cfg.get("fixed_input_size", False) and "dynamic_img_size" not in arguments
    data["fixed_input_size"] |= _has_weights(config, preset)
    return net, data


def require_weights(config: BackboneConfig) -> None:
    """UserError for a frozen backbone without weights, and for weights of the small one, of which there are none."""
    if config.name == "small" and (config.frozen or config.weights is not None):
        raise UserError("backbones: the small classifier has no weights from elsewhere: leave out frozen and weights")
    if config.frozen and not _has_weights(config, PRESETS.get(config.name)):
        raise UserError(
            f"backbones: {config.name}: a frozen backbone needs weights: set pretrained=true, or name their folder"
        )


def _has_weights(config: BackboneConfig, preset: _Preset | None) -> bool:
    return config.pretrained or config.weights is not None or preset is not None


def _is_of_fixed_size(name: str) -> bool:
    return bool(timm.models.get_pretrained_cfg(name).fixed_input_size) if timm.models.is_model(name) else False

"""The networks of DDIM stairs: torchcfm's copies of the ADM U-Net and of the ADM classifier.

Their parameters carry guided-diffusion's own names (Dhariwal & Nichol 2021), so that its checkpoints, and Cellflow's,
load into `net`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchcfm.models.unet.unet import EncoderUNetModel, UNetModel

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.checkpoint import without_memory
from cellflux_bridge.ddim.settings import ADMConfig


class Denoiser(nn.Module):
    """The noise eps in a noised image, by class; with `learn_sigma` also where the step's variance lies.

    `has_null` adds one row to the class embedding, numbered `null_class`, for classifier-free guidance. The output has
    C channels, or 2C with `learn_sigma`: noise first, then v in [-1, 1] (improved diffusion, Nichol & Dhariwal 2021).
    """

    def __init__(
        self, config: ADMConfig, *, image_size: int, num_classes: int, learn_sigma: bool, has_null: bool, channels=3
    ):
        super().__init__()
        self.null_class = num_classes if has_null else None
        arguments = _arguments(config, image_size, channels, key="ddim.denoiser")
        out_channels = channels * (2 if learn_sigma else 1)
        self.net = UNetModel(out_channels=out_channels, num_classes=num_classes + has_null, **arguments)

    def forward(self, x: torch.Tensor, tau: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """All outputs (B, C or 2C, H, W) for states x (B, C, H, W) at steps tau (B,) of 1000 and classes y (B,)."""
        return self.net(tau, x, y)

    def eps(self, x: torch.Tensor, tau: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The noise (B, C, H, W) alone, which is all that DDIM uses."""
        return self(x, tau, y)[:, : x.shape[1]]


class NoisyClassifier(nn.Module):
    """Logits of the class of a noised image: ADM's encoder half with attention pooling (sec. 4 of ADM)."""

    def __init__(self, config: ADMConfig, *, image_size: int, num_classes: int, channels: int = 3):
        super().__init__()
        arguments = _arguments(config, image_size, channels, key="ddim.classifier")
        self.net = EncoderUNetModel(out_channels=num_classes, pool="attention", **arguments)

    def forward(self, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of states x (B, C, H, W) at steps tau (B,) of 1000."""
        return self.net(x, tau)


def _arguments(config: ADMConfig, image_size: int, channels: int, *, key: str) -> dict:
    """What both networks of ADM take; UserError for sizes that do not fit each other."""
    rates = [2**level for level in range(len(config.multipliers))]
    if image_size % rates[-1]:
        raise UserError(f"data.image_size={image_size}: not divisible by {rates[-1]}, the stride of {key}.multipliers")
    sides = {image_size // rate: rate for rate in rates}
    for side in config.attention:
        if side not in sides:
            raise UserError(f"{key}.attention: no map of side {side} px at {image_size} px; sides: {list(sides)}")
    attending = [rates.index(sides[side]) for side in config.attention]
    for width in (config.widths[n] for n in (*attending, -1)):  # the innermost map always attends
        if width % config.head_channels:
            raise UserError(f"{key}.head_channels: {config.head_channels} does not divide the width {width}")
    return {
        "image_size": image_size,
        "in_channels": channels,
        "model_channels": config.channels,
        "num_res_blocks": config.blocks,
        "attention_resolutions": [sides[side] for side in config.attention],
        "dropout": config.dropout,
        "channel_mult": config.multipliers,
        "num_head_channels": config.head_channels,
        "use_scale_shift_norm": config.scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.new_attention_order,
    }


def load_foreign(build: Callable[[], nn.Module], path: Path, *, key: str) -> nn.Module:
    """The network that `build` makes, with a guided-diffusion or Cellflow `.pt` file of tensors in its `net`, strictly;
    nothing is unpickled, and a network that does not fit the file takes no memory.

    Shapes do not tell `new_attention_order` and `head_channels`: weights loaded under a wrong one give wrong images
    without an error. Raises UserError for a file that is absent, damaged or holds other things than tensors, and one
    that lists what differs for weights of another architecture.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{key}.weights: {path} is not there") from error
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        raise UserError(
            f"{key}.weights: {path} is damaged, or holds more than tensors, which is not loaded because it could run "
            f"code ({error!s:.200}); expected a state dict as guided-diffusion writes it"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{key}.weights: {path}: expected a flat state dict of tensors (model*.pt or ema_*.pt)")
    weights = _with_null_row(weights)
    own = without_memory(lambda: build().net, origin=key)
    if differing := list(_differences(own, weights)):
        found = f"{'; '.join(differing[:6])}{' and more' * (len(differing) > 6)}"
        raise UserError(f"{key}.weights: {path} is of another architecture than {key} describes: {found}")
    network = build()
    network.net.load_state_dict(weights, strict=True)
    return network


def _with_null_row(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cellflow's classifier-free denoiser, whose class embedding goes through two linear layers (`class_emb`), as the
    same network in guided-diffusion's names: a table of these layers' outputs, with zeros for no class at its end."""
    names = ("label_emb.weight", *(f"class_emb.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")))
    if not all(name in weights for name in names):
        return weights
    table, w0, b0, w2, b2 = (weights[name].float() for name in names)
    rows = F.linear(F.silu(F.linear(table, w0, b0)), w2, b2)
    rest = {name: value for name, value in weights.items() if name not in names}
    return {**rest, names[0]: torch.cat([rows, torch.zeros_like(rows[:1])])}


# What the shape of a tensor means, where it means one key of the configuration.
_MEANINGS = {
    "label_emb.weight": (0, "classes (with the null class of ddim.guidance=classifier_free, if any)"),
    "input_blocks.0.0.weight": (0, "channels times the first of multipliers"),
    "out.2.weight": (0, "output channels (doubled by ddim.learn_sigma)"),
    "out.2.c_proj.weight": (0, "classes"),
    "out.2.positional_embedding": (1, "places in the innermost map plus one (data.image_size, multipliers)"),
}


def _differences(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor]):
    """What differs between two state dicts, the telling tensors first."""
    shared = sorted(own.keys() & found.keys(), key=lambda name: (name not in _MEANINGS, name))
    for name in shared:
        here, there = list(own[name].shape), list(found[name].shape)
        axis, meaning = _MEANINGS.get(name, (0, None))
        if meaning and len(here) == len(there) and here[axis] != there[axis]:
            yield f"{there[axis]} {meaning} in the file, {here[axis]} in the configuration ({name})"
        elif here != there:
            yield f"{name} is {there} in the file, {here} in the configuration"
    for kind, names in (("missing", own.keys() - found.keys()), ("unknown", found.keys() - own.keys())):
        if names:
            yield f"{len(names)} tensors {kind}, such as {min(names)}"

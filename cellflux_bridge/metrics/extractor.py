"""Feature extractors by name: any timm model with its weights, which prepares images as it knows them."""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError

PREFIXES = ("timm:", "hf-hub:", "local-dir:")


def is_name(text: str) -> bool:
    """Whether a text names an extractor; else it is the folder of a classifier's run."""
    return text.startswith(PREFIXES)


class NamedExtractor(nn.Module):
    """The pretrained model of `timm:NAME`, `timm:NAME@WEIGHTS_FILE`, `hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

    Images are resized to the side that its configuration names (bicubic, antialiased) and get its mean and standard
    deviation. Raises UserError for an unknown model, and for weights that are missing or do not fit.
    """

    def __init__(self, name: str):
        super().__init__()
        model, _, file = name.removeprefix("timm:").partition("@" if name.startswith("timm:") else "\0")
        overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        if file and not Path(file).is_file():
            raise UserError(f"--features {name}: {file}: no such file; expected weights of {model}")
        try:
            self.net = timm.create_model(model, pretrained=True, num_classes=0, **overlay)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, SafetensorError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"--features {name}: cannot be loaded ({reason}); expected timm:NAME, timm:NAME@WEIGHTS_FILE, "
                "hf-hub:OWNER/NAME or local-dir:FOLDER (config.json and weights of a timm model), or a run's folder; "
                "weights that are not here already are fetched, which takes a connection"
            ) from error
        data = timm.data.resolve_model_data_config(self.net)
        self.size: int = data["input_size"][-1]
        self.register_buffer("mean", torch.tensor(data["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(-1, 1, 1))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D), pooled over space, of patches (B, 3, H, W) in [-1, 1]."""
        return self.net(self._input(x))

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs (B, C, h, w) of its stages, finest first."""
        return self.net.forward_intermediates(self._input(x), intermediates_only=True)

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return ((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

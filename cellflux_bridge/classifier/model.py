"""Patch classifiers: a small built-in or any timm model, and what they look at."""

import timm
import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.errors import UserError

_GREY = (0.299, 0.587, 0.114)


class SmallCNN(nn.Module):
    """A residual network of about 0.7 M parameters for patches of 32 to 96 pixels; it trains in minutes on a CPU."""

    def __init__(self, in_channels: int, num_classes: int, *, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        layers, width = [], widths[0]
        for out in widths:
            layers.append(_Residual(width, out, stride=2))
            layers.append(_Residual(out, out, stride=1))
            width = out
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean(dim=(2, 3)))


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, *, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
        )
        same = stride == 1 and channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.body(x)


def grey_view(x: torch.Tensor) -> torch.Tensor:
    """Luminance (B, 1, H, W) with each image's own mean and contrast taken out.

    This is the lightness of a Reinhard-normalised patch up to constants: a change of brightness or contrast cannot be
    seen in it, nor a tint that moves luminance alike everywhere.
    """
    grey = (x * torch.tensor(_GREY, device=x.device, dtype=x.dtype)[:, None, None]).sum(1, keepdim=True)
    mean, std = grey.mean((2, 3), keepdim=True), grey.std((2, 3), keepdim=True)
    return (grey - mean) / std.clamp_min(0.05)


class PatchClassifier(nn.Module):
    """Class logits (B, num_classes) of RGB patches (B, 3, H, W) in [-1, 1].

    `view` is "rgb" or "grey" (see `grey_view`). In training mode contrast and brightness are jittered by up to
    `jitter` (relative), and images are blurred by a Gaussian of up to `blur` pixels.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "small",
        pretrained: bool = False,
        view: str = "rgb",
        jitter: float = 0.0,
        blur: float = 0.0,
    ):
        super().__init__()
        self._view, self._jitter, self._blur = view, jitter, blur
        channels = 3 if view == "rgb" else 1
        if backbone == "small":
            self.net = SmallCNN(channels, num_classes)
        else:
            try:
                self.net = timm.create_model(
                    backbone, pretrained=pretrained, num_classes=num_classes, in_chans=channels
                )
            except RuntimeError as error:
                raise UserError(f"classifier.backbone: {error}; expected 'small' or a timm model name") from error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self._blur > 0:
            x = _random_blur(x, self._blur)
        x = grey_view(x) if self._view == "grey" else x
        if self.training and self._jitter > 0:
            scale, shift = self._jitter * (2 * torch.rand(2, len(x), 1, 1, 1, device=x.device) - 1)
            x = x * (1 + scale) + shift
        return self.net(x)


def _random_blur(x: torch.Tensor, max_sigma: float) -> torch.Tensor:
    """Every image blurred by its own Gaussian, sigma uniform in [0, max_sigma] pixels."""
    b, c, _, _ = x.shape
    radius = max(1, round(2.5 * max_sigma))
    sigma = (max_sigma * torch.rand(b, 1, device=x.device)).clamp_min(1e-3)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None, None]
    flat = F.pad(x.reshape(1, b * c, *x.shape[2:]), (radius,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel, groups=b * c), kernel.transpose(2, 3), groups=b * c)
    return flat.view_as(x)

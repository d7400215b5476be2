"""Patch classifiers: a small built-in or any timm model, what they look at, and calibrated log-probabilities."""

import math

import timm
import torch
from torch import nn
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError

_GREY = (0.299, 0.587, 0.114)
# A classifier of states has one temperature for each of this many equal intervals of the time.
TIME_BINS = 5
_TIME_FREQUENCIES = (1, 2)
_TIME_CHANNELS = 1 + 2 * len(_TIME_FREQUENCIES)
_GROUPS = 8  # of group normalisation


# Backbones that need no timm, and the pixels a side that they fold into channels first.
BUILT_IN = {"small": 1, "fast": 2}


class SmallCNN(nn.Module):
    """A residual network of about 0.7 M parameters for patches of 32 to 96 pixels; it trains in minutes on a CPU.

    With `fold` 2 it sees 2 x 2 pixels as channels of one (pixel unshuffle), which loses nothing and costs a quarter.
    Group normalisation, because averaged weights do not go with a batch normalisation's statistics: in short runs these
    shift every probability by a tenth.
    """

    def __init__(self, in_channels: int, num_classes: int, *, fold: int = 1, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.fold = nn.PixelUnshuffle(fold)
        self.stem = nn.Conv2d(in_channels * fold**2, widths[0], 3, padding=1, bias=False)
        layers = []
        for before, width in zip((widths[0], *widths[:-1]), widths, strict=True):
            layers += [_Residual(before, width, stride=2), _Residual(width, width, stride=1)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(_GROUPS, widths[-1]), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(widths[-1], num_classes))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(self.fold(x)))

    def forward_intermediates(self, x: torch.Tensor, *, intermediates_only: bool = True) -> list[torch.Tensor]:
        """The outputs of its three widths, in the manner of timm's models."""
        assert intermediates_only, "logits come from forward"
        x, maps = self.stem(self.fold(x)), []
        for first, second in zip(self.body[:-2:2], self.body[1:-2:2], strict=True):
            x = second(first(x))
            maps.append(x)
        return maps

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, *, stride: int):
        super().__init__()
        layers = []
        for width, step in ((channels_in, stride), (channels_out, 1)):
            convolution = nn.Conv2d(width, channels_out, 3, step, 1, bias=False)
            layers += [nn.GroupNorm(_GROUPS, width), nn.ReLU(), convolution]
        self.body = nn.Sequential(*layers)
        same = stride == 1 and channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.body(x)


def grey_view(x: torch.Tensor) -> torch.Tensor:
    """Luminance (B, 1, H, W) with each image's own mean and contrast taken out.

    Up to constants this is the lightness of a Reinhard-normalised patch: it hides changes of brightness and contrast,
    and a tint that changes luminance equally everywhere.
    """
    grey = (x * torch.tensor(_GREY, device=x.device, dtype=x.dtype)[:, None, None]).sum(1, keepdim=True)
    mean, std = grey.mean((2, 3), keepdim=True), grey.std((2, 3), keepdim=True)
    return (grey - mean) / std.clamp_min(0.05)


def time_planes(t: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Times (B,) in [0, 1] as constant planes (B, 5, height, width): 2t - 1, sin and cos of 2 pi t and of 4 pi t."""
    angles = [2 * math.pi * k * t for k in _TIME_FREQUENCIES]
    values = torch.stack([2 * t - 1, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))], dim=1)
    return values[:, :, None, None].expand(-1, -1, height, width)


def time_bin(t: torch.Tensor) -> torch.Tensor:
    """The number, int64, of the temperature that belongs to each time (B,): equal intervals of [0, 1]."""
    return (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)


class PatchClassifier(nn.Module):
    """Class logits (B, num_classes) of patches (B, channels, H, W) in [-1, 1].

    It sees an "image", `model(x)`, or a "state" x_t of a path at times t (B,) in [0, 1], `model(x_t, t)`, or with the
    clean source, `model(x_t, t, x0)`, where `source_image` is set. Time enters as constant channels, which any backbone
    can read. `channels` are those of an image or a state.

    `view` of images is "rgb" (all channels) or "grey" (see `grey_view`). In training mode contrast and brightness are
    jittered by up to `jitter` (relative), and images are blurred by a Gaussian of up to `blur` pixels. States are seen
    as they are. A `pretrained` timm model gets colours with the mean and standard deviation of its own training;
    `download` fetches its weights, which a checkpoint does not need.

    Logits are for the loss. `log_probabilities` are calibrated: logits are divided by `temperature` (temperature
    scaling, Guo et al. 2017), one number, or for states one for each interval of time.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        backbone: str = "small",
        pretrained: bool = False,
        download: bool = True,
        sees: str = "image",
        source_image: bool = False,
        view: str = "rgb",
        jitter: float = 0.0,
        blur: float = 0.0,
    ):
        super().__init__()
        of_states = sees == "state"
        assert view == "rgb" or not of_states, "the configuration refuses other views of states"
        self.sees, self.source_image, self.num_classes = sees, source_image and of_states, num_classes
        self._view, self._jitter, self._blur = view, jitter * (not of_states), blur * (not of_states)
        if channels != 3 and (view == "grey" or pretrained):
            raise UserError(f"classifier.view=grey and pretrained=true: for RGB images only, found {channels} channels")
        seen = 1 if view == "grey" else channels * (1 + self.source_image) + _TIME_CHANNELS * of_states
        self.register_buffer("temperature", torch.ones(TIME_BINS if of_states else 1))
        if backbone in BUILT_IN:
            self.net = SmallCNN(seen, num_classes, fold=BUILT_IN[backbone])
        else:
            self.net = _timm_model(backbone, seen, num_classes, download=pretrained and download)
        self._pretrained = (
            pretrained and backbone not in BUILT_IN and view == "rgb"
        )  # the grey view is normalised already
        if self._pretrained:
            data = timm.data.resolve_model_data_config(self.net)
            for name in ("mean", "std"):
                self.register_buffer(name, torch.tensor(data[name]).view(3, 1, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None, x0: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(self._input(x, t, x0))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs (B, D) of the last layer, pooled over space, of images."""
        return self.net.forward_head(self.net.forward_features(self._input(x)), pre_logits=True)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs (B, C, h, w) of the backbone's stages, finest first, of images."""
        return self.net.forward_intermediates(self._input(x), intermediates_only=True)

    def log_probabilities(
        self, x: torch.Tensor, t: torch.Tensor | None = None, x0: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Calibrated log p(class | x), (B, num_classes), differentiable with respect to x."""
        temperature = self.temperature if t is None else self.temperature[time_bin(t), None]
        return (self(x, t, x0) / temperature).log_softmax(1)

    def _input(self, x: torch.Tensor, t: torch.Tensor | None = None, x0: torch.Tensor | None = None) -> torch.Tensor:
        assert (t is not None) == (self.sees == "state"), "a time belongs to a state, and a state to a time"
        assert (x0 is not None) == self.source_image, "the clean source is given where source_image says so"
        if self.training and self._blur > 0:
            x = _random_blur(x, self._blur)
        x = grey_view(x) if self._view == "grey" else x
        if self.training and self._jitter > 0:
            scale, shift = self._jitter * (2 * torch.rand(2, len(x), 1, 1, 1, device=x.device) - 1)
            x = x * (1 + scale) + shift
        seen = [x] if x0 is None else [x, x0]
        if self._pretrained:
            seen = [((image + 1) / 2 - self.mean) / self.std for image in seen]
        if t is not None:
            seen.append(time_planes(t.to(x), *x.shape[2:]))
        return torch.cat(seen, dim=1)


def _timm_model(backbone: str, channels: int, num_classes: int, *, download: bool) -> nn.Module:
    try:
        return timm.create_model(backbone, pretrained=download, num_classes=num_classes, in_chans=channels)
    except RuntimeError as error:
        raise UserError(f"classifier.backbone: {error}; expected {', '.join(BUILT_IN)} or a timm model name") from error
    except OSError as error:  # what the hub's client raises where it cannot reach the hub
        remedy = "set classifier.pretrained=false, or connect to the internet once"
        raise UserError(
            f"classifier.pretrained: the weights of {backbone} cannot be fetched ({error}); {remedy}"
        ) from error


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

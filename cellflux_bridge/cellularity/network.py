"""The network that finds nuclei: a small U-Net from an RGB image to fields that tell single nuclei apart.

Its design follows published ones: a foreground and a distance to the background (Naylor et al. 2019, DRFNS), and every
nuclear pixel's offset to its nucleus's centre (Cheng et al. 2020, Panoptic-DeepLab). A field of the nuclear diameter
tells how large nuclei are, so that an image of unknown magnification can be brought to the network's own scale.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cellflux_bridge import checkpoint
from cellflux_bridge.base.errors import UserError, abbreviate

# Fields: logit of "nuclear"; depth, 0 at the outline and 1 in the middle; offset (row, column) to the centre, in units
# of `OFFSET_UNIT` px; binary logarithm of the nucleus's diameter over `DIAMETER_UNIT` px.
FOREGROUND, DEPTH, OFFSET, DIAMETER = 0, 1, slice(2, 4), 4
NUM_FIELDS = 5
OFFSET_UNIT, DIAMETER_UNIT = 8.0, 16.0
# Sides are multiples of it; how far a pixel of the image reaches into the fields, in px.
STRIDE, REACH = 16, 128
WIDTHS = (24, 48, 88, 112)
_MOST_WIDTH = 4096
BUILT_IN = Path(__file__).parent / "weights" / "nuclei.safetensors"


class _Layer(nn.Module):
    """3x3, batch normalisation, ReLU, and the input added where it has the same shape."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.conv(x)), inplace=True)
        if not self.is_residual:
            return h
        return x + h if h.requires_grad else h.add_(x)  # in place, without fresh memory


class NucleiNet(nn.Module):
    """Absorption (B, 3, H, W) in [0, 1], 1 - RGB / 255, to fields (B, 5, H, W); sides are multiples of 16.

    `widths` are the channels of the maps at a half, a quarter, an eighth and a sixteenth of the resolution.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        first = widths[0]
        self.down = nn.ModuleList([nn.Sequential(_Layer(12, first), _Layer(first, first))])
        for above, width in pairwise(widths):
            self.down.append(nn.Sequential(_Layer(above, width, stride=2), _Layer(width, width)))
        self.lift = nn.ModuleList(nn.Conv2d(width, above, 1) for above, width in pairwise(widths))
        self.up = nn.ModuleList(_Layer(width, width) for width in widths[:-1])
        self.last, self.head = _Layer(first, first), nn.Conv2d(first, 4 * NUM_FIELDS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.head(self.maps(x)[-1]), 2)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What it sees in absorption (B, 3, H, W): maps at a half to a sixteenth of the resolution on the way down, and
        the last one, at a half, of which the fields are made."""
        x, maps = F.pixel_unshuffle(x, 2), []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        for lift, up, skip in zip(reversed(self.lift), reversed(self.up), reversed(maps[:-1]), strict=True):
            x = up(skip + F.interpolate(lift(x), scale_factor=2, mode="bilinear"))
        return [*maps, self.last(x)]


def fused(model: NucleiNet) -> NucleiNet:
    """The network with its normalisation folded into the convolutions, for inference; it is changed in place."""
    for layer in model.eval().modules():
        if isinstance(layer, _Layer) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


def weights_file(model: str | Path) -> Path:
    """The file of a model: a file, the newest checkpoint's of a run folder, or, of "", the built-in one."""
    path = Path(model or BUILT_IN)
    return checkpoint.latest(path) / checkpoint.WEIGHTS if path.is_dir() else path


def read_weights(model: str | Path = "") -> dict[str, torch.Tensor]:
    """The weights, in single precision, of a model: a safetensors file, a run folder, or, of "", the built-in one.

    Raises UserError where there are none, or those of something else.
    """
    path = weights_file(model)
    try:
        weights = load_file(path)
        with torch.device("meta"):  # shapes alone, however large a file says they are
            own = NucleiNet(_widths_of(weights)).state_dict()
        require_fit(weights, own, file=path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a nuclei model (.safetensors)") from error
    return {name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()}


def require_fit(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor], *, file: Path) -> None:
    """UserError, which names the tensors, where weights are not those of a network with the tensors `own`."""
    shapes, wanted = ({name: tuple(w.shape) for name, w in each.items()} for each in (weights, own))
    if wrong := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise UserError(
            f"{file}: not the weights of this nuclei network; these tensors are missing, unknown or of another shape: "
            f"{abbreviate(wrong)}. Expected a file that train-nuclei wrote, with the same network.widths"
        )


def _widths_of(weights: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """The `widths` of the network that weights belong to; those of the built-in one where they are none of it."""
    norms = [weights.get(f"down.{number}.1.norm.weight") for number in range(len(WIDTHS))]
    is_one = all(norm is not None and norm.ndim == 1 and 1 <= len(norm) <= _MOST_WIDTH for norm in norms)
    return tuple(map(len, norms)) if is_one else WIDTHS


def require_device(device: str) -> None:
    """UserError for what is neither the processor nor a CUDA device that is there."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if device not in ["cpu", *gpus] and not (device == "cuda" and gpus):
        raise UserError(f"--device {device}: not there; expected cpu, or cuda or cuda:N with such a GPU")


@lru_cache(maxsize=2)
def load_network(model: str = "", device: str = "cpu") -> NucleiNet:
    """The fused network of a file or run folder ("": the built-in one), for inference; UserError as `read_weights`."""
    weights = read_weights(model)
    network = NucleiNet(_widths_of(weights))
    network.load_state_dict(weights)
    require_device(device)
    return fused(network).to(device)


def write_half(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write weights in half precision, as they ship with the package."""
    half = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in half.items()}, file)

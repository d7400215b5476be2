"""Nuclei by the network: at its own scale, many frames together, large images tile by tile."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from cellflux_bridge import images
from cellflux_bridge.cellularity.fields import nuclei_of
from cellflux_bridge.cellularity.label_maps import resample
from cellflux_bridge.cellularity.network import DIAMETER, DIAMETER_UNIT, FOREGROUND, REACH, STRIDE, NucleiNet
from cellflux_bridge.cellularity.parameters import Scale

# The nuclear diameter, in px, and the microns per pixel at which the network sees an image.
_DIAMETER, _MPP = 18.0, 0.4
# The first look takes the shorter side for so many px at the network's scale, within a half and twice.
_FIRST_SIDE, _FIRST = 128, (0.5, 2.0)
# The most looks, and the side in px of the middle that the first and the others take in.
_MOST_LOOKS, _FIRST_LOOK, _LOOK = 3, 256, 160
_BOUNDS = (1 / 8, 8.0)
# Estimated scales enlarge an image to so many px at most, lest a large one of small nuclei takes many times its time.
_MOST_ENLARGED = 1 << 17
# An image of more px at the network's scale is cut into tiles of this side, plus a margin, that share nothing.
_TILE, _MARGIN = 1536, REACH + 32
_BATCH_PIXELS = 1 << 20


def known_scale(mpp: float) -> Scale:
    """The scale of images whose microns per pixel are known."""
    return Scale(float(np.clip(mpp / _MPP, *_BOUNDS)))


def estimate_scale(stack: Sequence[np.ndarray], model: NucleiNet) -> Scale:
    """The scale of images (H, W, 3) uint8 of one size and magnification.

    The network tells the diameters of the nuclei that it sees. It looks at the images at up to three scales, each of
    which brings the diameter found last to 18 px; of these the one is chosen at which it finds that most nearly. An
    image is not enlarged beyond 131,072 px (362 x 362).
    """
    if len(stack) == 0:
        return Scale(1.0, None, 0.0)
    factor = float(np.clip(_FIRST_SIDE / min(stack[0].shape[:2]), *_FIRST))
    looks: list[tuple[float, float]] = []  # (factor, diameter in px of the network)
    for _ in range(_MOST_LOOKS):
        seen = _seen_diameter(stack, factor, model, side=_LOOK if looks else _FIRST_LOOK)
        if seen is not None:
            looks.append((factor, seen))
        elif looks:
            break
        wanted = factor * (2.0 if seen is None else _DIAMETER / seen)
        if seen is not None and abs(np.log2(wanted / factor)) < 0.25:
            break
        factor = float(np.clip(wanted, *_BOUNDS))
    if not looks:  # the middle is empty: look at all of it
        factor = _FIRST[0]
        if (seen := _seen_diameter(stack, factor, model, side=max(stack[0].shape[:2]))) is None:
            return Scale(1.0, None, 0.0)
        looks.append((factor, seen))
    by_fit = sorted(looks, key=lambda look: abs(np.log2(look[1] / _DIAMETER)))
    factor, seen = by_fit[0]
    told = [diameter / at for at, diameter in looks]
    agreement = min(told) / max(told)
    most = max(1.0, np.sqrt(_MOST_ENLARGED / np.prod(stack[0].shape[:2])))
    chosen = float(np.clip(factor * _DIAMETER / seen, _BOUNDS[0], min(most, _BOUNDS[1])))
    return Scale(chosen, seen / factor, agreement)


def _seen_diameter(stack: Sequence[np.ndarray], factor: float, model: NucleiNet, *, side: int) -> float | None:
    """The median diameter of nuclei, in px of the network, in the middle of images at a scale; None without any."""
    height, width = (min(own, round(side / factor)) for own in stack[0].shape[:2])
    middle = [images.centre_crop(rgb, height, width) for rgb in stack]
    parts = _fields(_scaled(middle, factor), model)
    told = np.concatenate([fields[:, DIAMETER][fields[:, FOREGROUND] > 0] for fields in parts])
    diameters = DIAMETER_UNIT * 2 ** np.clip(told, -3, 3)
    weights = diameters**-2.0  # so that every nucleus counts once
    if weights.sum() < 0.5:
        return None
    order = np.argsort(diameters)
    return float(diameters[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)])


def _scaled(stack: Sequence[np.ndarray], factor: float) -> np.ndarray:
    """Images (B, h, w, 3) uint8 at a scale."""
    size = [max(1, round(side * factor)) for side in stack[0].shape[:2]]
    return np.stack([images.resize(rgb, *size) for rgb in stack])


def _fields(stack: np.ndarray, model: NucleiNet) -> Iterator[np.ndarray]:
    """The fields (b, 5, h, w) float32 of images (B, h, w, 3) uint8, in parts of bounded memory."""
    height, width = stack.shape[1:3]
    device = next(model.parameters()).device
    num = max(1, _BATCH_PIXELS // (height * width))
    for start in range(0, len(stack), num):
        x = torch.from_numpy(stack[start : start + num]).to(device).permute(0, 3, 1, 2)
        x = F.pad(1 - x.float() / 255, (0, -width % STRIDE, 0, -height % STRIDE))
        with torch.inference_mode(), _half_where_native(device):
            yield model(x.contiguous(memory_format=torch.channels_last))[..., :height, :width].float().cpu().numpy()


def _half_where_native(device: torch.device) -> torch.autocast:
    """Convolutions in bfloat16, twice as fast, on processors that compute in it."""
    is_native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # elsewhere it is emulated, and slow
    return torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu" and is_native)


def find_nuclei(stack: np.ndarray, scale: Scale, model: NucleiNet) -> np.ndarray:
    """The nuclei of RGB images (B, H, W, 3) uint8 as label maps (B, H, W) int32, each numbered 1..n."""
    seen = _scaled(stack, scale.factor)
    if max(seen.shape[1:3]) > _TILE + 2 * _MARGIN:
        labels = [_by_tiles(rgb, model) for rgb in seen]
    else:
        labels = [nuclei_of(fields) for part in _fields(seen, model) for fields in part]
    return np.stack([resample(found, stack.shape[1:3]) for found in labels])


def _by_tiles(rgb: np.ndarray, model: NucleiNet) -> np.ndarray:
    """The nuclei of one image: a nucleus is that of the tile in which its centre lies, and found with a margin around
    it out to which the network sees."""
    labels, num = np.zeros(rgb.shape[:2], np.int32), 0
    for top in range(0, rgb.shape[0], _TILE):
        for left in range(0, rgb.shape[1], _TILE):
            y, x = max(0, top - _MARGIN), max(0, left - _MARGIN)
            part = rgb[None, y : top + _TILE + _MARGIN, x : left + _TILE + _MARGIN]
            found = nuclei_of(next(_fields(part, model))[0], core=(top - y, left - x, _TILE))
            here = labels[y : y + found.shape[0], x : x + found.shape[1]]
            new = (found > 0) & (here == 0)
            here[new] = found[new] + num
            num += found.max()
    return labels

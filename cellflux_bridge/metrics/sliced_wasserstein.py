"""Sliced Wasserstein distance of two sets of patches on a Laplacian pyramid: at which size of detail they differ.

Karras et al. (2018, "Progressive Growing of GANs", sec. 5). Other than there, descriptors of both sets are scaled by
the real set's mean and spread, so that a set of another colour or contrast lies far away.
"""

import numpy as np
import torch
from skimage.transform import pyramid_expand, pyramid_reduce
from torch.nn import functional as F

from cellflux_bridge.base.seeds import torch_generator

# Sides of the smallest level and of a descriptor; descriptors of an image; directions; images of a set at most.
_SMALLEST, _SIDE, _NUM, _DIRECTIONS, _MOST = 16, 7, 64, 256, 2000
SCALES = ("full", "half", "quarter", "eighth", "sixteenth")


def laplacian_pyramid(patches: np.ndarray) -> list[np.ndarray]:
    """Of patches (N, C, H, W): what each level has over the next smaller one, and the smallest itself; finest first.

    float32 (N, C, h, w), each level of half the size, down to one whose shorter side is at least 16 px, at most five.
    """
    levels, current = [], patches.astype(np.float32) / 127.5 - 1
    while min(current.shape[2:]) >= 2 * _SMALLEST and len(levels) < len(SCALES) - 1:
        # Images as channels: the pyramid's blur is of the two sides alone.
        stacked = current.reshape(-1, *current.shape[2:]).transpose(1, 2, 0)
        smaller = pyramid_reduce(stacked, channel_axis=-1)
        larger = pyramid_expand(smaller, channel_axis=-1)[: stacked.shape[0], : stacked.shape[1]]
        levels.append((stacked - larger).transpose(2, 0, 1).reshape(current.shape).astype(np.float32))
        current = smaller.transpose(2, 0, 1).reshape(*current.shape[:2], *smaller.shape[:2]).astype(np.float32)
    return [*levels, current]


def _descriptors(level: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """7 x 7 px of all channels at random places of every image of a level, (N * 64, C * 49) float32."""
    windows = np.lib.stride_tricks.sliding_window_view(level, (_SIDE, _SIDE), axis=(2, 3))
    places = torch.randint(windows.shape[2] * windows.shape[3], (len(level), _NUM), generator=generator).numpy()
    row, column = np.divmod(places, windows.shape[3])
    return windows[np.arange(len(level))[:, None], :, row, column].reshape(len(level) * _NUM, -1)


def swd(made: np.ndarray, real: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """The distance of patches (N, C, H, W) to real ones (M, C, H, W), both uint8, of each level of the pyramid.

    The mean over 256 directions of the distance of the sorted projections, in thousandths of the real descriptors'
    spread. It is biased upward for few patches: compare it with its floor of as many. Of at most 2,000 a set. A level
    whose side is under 7 px has none.
    """
    found = {}
    pairs = zip(laplacian_pyramid(made[:_MOST]), laplacian_pyramid(real[:_MOST]), strict=True)
    for number, (level, of_real) in enumerate(pairs):
        if min(level.shape[2:]) < _SIDE:
            break
        generator = torch_generator(seed, "swd", number)
        ours, theirs = (_descriptors(each, generator) for each in (level, of_real))
        # Of every channel by itself, as published.
        channels = theirs.reshape(len(theirs), made.shape[1], -1)
        mean, spread = (of(axis=(0, 2), keepdims=True) for of in (channels.mean, channels.std))
        directions = F.normalize(torch.randn(theirs.shape[1], _DIRECTIONS, generator=generator), dim=0)
        sorted_ = []
        for each in (ours, theirs):
            scaled = (each.reshape(len(each), made.shape[1], -1) - mean) / np.maximum(spread, 1e-6)
            sorted_.append((torch.from_numpy(scaled.reshape(len(each), -1)) @ directions).sort(dim=0).values)
        num = min(map(len, sorted_))  # quantiles that both have
        first, second = (of[((torch.arange(num) + 0.5) * len(of) / num).long()] for of in sorted_)
        found[SCALES[number]] = 1e3 * (first - second).abs().mean().item()
    return found
